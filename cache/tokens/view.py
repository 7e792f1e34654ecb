"""A fixed view of a packed layer's tokens: what attention reads, and what dense tensors are decoded from.

Where heads keep different tokens, a dense tensor has as many as the layer counts: a head's sinks first, the
rest last, zeros between them in place of the tokens that it has evicted (`PackedView.evicted`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantpress.cache.tokens.head_counts import HeadCounts
from quantpress.cache.tokens.segments import after, first
from quantpress.errors import UnsupportedModelError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True)
class PackedView:
    """Sink tokens, then packed pages, then recent tokens, at one moment.

    Args:
        sinks: the first tokens, 16 bits.
        packed: the pages.
        recent: the last tokens, 16 bits.
        tokens: how many of them are in view, counted from the first.
        dtype: of the model's keys and values.
        coarse: pages of fewer bits behind the sinks, if there are any.
        heads: which places of each head hold a token; None: all.
        for_attention: dense tensors are refused where heads keep different tokens: whoever attends to them
            does not know which are not there.
        held: what keeps the memory of the pages from being written over.
        step: the same tokens as segments at fixed addresses, with lengths on the device; None outside of a
            step (see `quantpress.cache.fixed.fixed_tokens`).
    """

    sinks: DenseSegment
    packed: PackedSegment
    recent: DenseSegment
    tokens: int
    dtype: torch.dtype
    coarse: PackedSegment | None = None
    heads: HeadCounts | None = None
    for_attention: bool = False
    held: tuple[object, ...] = ()
    step: tuple[Segment, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Hkv, tokens in view)."""
        return (*self.sinks.keys.shape[:2], self.tokens)

    def narrow(self, tokens: int) -> "PackedView":
        """The first `tokens` tokens."""
        return self if tokens >= self.tokens else replace(self, tokens=tokens, step=None)

    def segments(self) -> list[Segment]:
        """The tokens in view as attention segments; a page that is cut is decoded.

        Raises:
            UnsupportedModelError: a step is being captured, which must not depend on how many tokens there
                are now.
            InvalidInputError: the view ends among tokens that single heads have evicted.
        """
        if self.step is not None and self.sinks.keys.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedModelError(
                "this model's attention decodes the packed keys and values as a whole; only attention that "
                "reads them packed can be captured in a CUDA graph"
            )
        places = self.tokens
        if self.heads is not None:
            self.heads.check_whole(self.tokens)
            places -= self.heads.evicted
        segments: list[Segment] = [self._sinks(min(places, self.sinks.tokens))]
        left = places - self.sinks.tokens
        if self.coarse is not None and left > 0:
            segments += _clipped(self.coarse, left, self.dtype)
            left -= self.coarse.tokens
        pages = self.packed.tokens
        if left <= 0:
            return segments
        if left >= pages:
            return [*segments, self.packed, self._counted(self.recent, pages, left - pages)]
        whole, rest = divmod(left, PAGE_TOKENS)
        if whole:
            segments.append(self.pages(0, whole))
        if rest:
            cut = decode_segment(self.pages(whole, whole + 1), self.dtype)
            segments.append(self._counted(cut, whole * PAGE_TOKENS, rest))
        return segments

    def _sinks(self, places: int) -> DenseSegment:
        sinks = first(self.sinks, places)
        return sinks if self.heads is None else self.heads.counted_sinks(sinks)

    def _counted(self, tokens: DenseSegment, start: int, count: int) -> DenseSegment:
        """The first `count` of tokens that stand at place `start` of pages and recent ones."""
        part = first(tokens, count)
        if self.heads is None or self.heads.most_absent <= start:
            return part
        lengths, starts = self.heads.span(start, start + count)
        return replace(part, lengths=lengths, starts=starts)

    def pages(self, start: int, stop: int) -> PackedSegment:
        """Pages `start` to `stop` alone, planes [B, Hkv, n, ...]."""
        span = None if self.heads is None else self.heads.span(start * PAGE_TOKENS, stop * PAGE_TOKENS)
        lengths, starts = span or (None, None)
        return PackedSegment(*self.packed.narrow(start, stop), lengths=lengths, starts=starts)

    def gather(self, tokens: torch.Tensor) -> PackedSegment:
        """Packed tokens [B, Hkv, N], counted from the first packed place, as pages; N a multiple of 128."""
        keys, values = self.packed.whole_keys(), self.packed.whole_values()
        return PackedSegment(
            replace(keys, planes=keys.codec.gather(keys.planes, tokens)),
            replace(values, planes=values.codec.gather(values.planes, tokens)),
        )

    def newest(self, tokens: int) -> DenseSegment | None:
        """The last tokens, when all of them are recent ones, in every head; else None."""
        recent, heads = self.recent.tokens, self.heads
        evicted = 0 if heads is None else heads.evicted
        coarse = 0 if self.coarse is None else self.coarse.tokens
        whole = self.tokens == self.sinks.tokens + coarse + self.packed.tokens + recent + evicted
        there = heads is None or self.tokens - tokens >= heads.whole_from
        return after(self.recent, recent - tokens) if whole and there and 0 < tokens <= recent else None

    def evicted(self) -> torch.Tensor | None:
        """[B, Hkv, tokens] bool: where a dense tensor has no token of a head; None: nowhere."""
        if self.heads is None:
            return None
        self.heads.check_whole(self.tokens)
        places = self.sinks.tokens
        rest = self.tokens - self.heads.evicted - places
        there = self._laid_out(
            self.heads.sinks_in_use(places).unsqueeze(-1), self.heads.in_use(0, rest).unsqueeze(-1)
        )
        return ~there.squeeze(-1)

    def dense_keys(self) -> torch.Tensor:
        """Every key in view, decoded: [B, Hkv, tokens, D].

        Raises:
            UnsupportedModelError: see `for_attention`.
        """
        return self._dense(_keys)

    def dense_values(self) -> torch.Tensor:
        """Every value in view, decoded: [B, Hkv, tokens, Dv]; as `dense_keys`."""
        return self._dense(_values)

    def _dense(self, states_of: Callable[[Segment, torch.dtype], torch.Tensor]) -> torch.Tensor:
        segments = [one for one in self.segments() if one.tokens or isinstance(one, DenseSegment)]
        if self.heads is None:
            return torch.cat([states_of(segment, self.dtype) for segment in segments], dim=2)
        if self.for_attention:
            raise UnsupportedModelError(
                "heads of this layer keep different tokens, and this model's attention reads them as one "
                "tensor, where evicted ones cannot be told; use a press that evicts as many in each head, "
                'such as SnapKV, or load the model with attn_implementation="sdpa"'
            )
        states = torch.cat([states_of(segment, self.dtype) for segment in segments], dim=2)
        sinks, rest = states.split([self.sinks.tokens, states.shape[2] - self.sinks.tokens], dim=2)
        in_use = self.heads.sinks_in_use(sinks.shape[2]), self.heads.in_use(0, rest.shape[2])
        parts = [
            part.masked_fill(~used.unsqueeze(-1), 0) for part, used in zip((sinks, rest), in_use, strict=True)
        ]
        return self._laid_out(*parts)

    def _laid_out(self, sinks: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """[B, Hkv, tokens, D]: sinks in front, the rest at the end; zero what is no token before."""
        out = sinks.new_zeros(*sinks.shape[:2], self.tokens, sinks.shape[-1])
        count = min(self.tokens, rest.shape[2])
        out[:, :, self.tokens - count :] = rest[:, :, rest.shape[2] - count :]
        out[:, :, : sinks.shape[2]] += sinks[:, :, : self.tokens]
        return out

    def select(self, entries: torch.Tensor) -> "PackedView":
        """The same of batch entries [B'] int64."""

        def dense(segment: DenseSegment) -> DenseSegment:
            return DenseSegment(
                segment.keys.index_select(0, entries), segment.values.index_select(0, entries)
            )

        return replace(
            self,
            sinks=dense(self.sinks),
            packed=select_entries(self.packed, entries),
            coarse=None if self.coarse is None else select_entries(self.coarse, entries),
            recent=dense(self.recent),
            heads=None if self.heads is None else self.heads.map(lambda t: t.index_select(0, entries)),
            held=self.held if self.packed.table is not None else (),
            step=None,
        )


def select_entries(segment: PackedSegment, entries: torch.Tensor) -> PackedSegment:
    """Batch entries [B'] int64 of packed pages; those of a pool stay where they are."""

    def select(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(0, entries)

    def side(packed: PackedSide) -> PackedSide:
        own = segment.table is None
        planes = {name: select(plane) if own else plane for name, plane in packed.planes.items()}
        return PackedSide(packed.codec, planes, packed.transform.map(select))

    lengths, table, starts = (
        None if tensor is None else select(tensor)
        for tensor in (segment.lengths, segment.table, segment.starts)
    )
    return PackedSegment(side(segment.keys), side(segment.values), lengths, table, starts)


def _clipped(pages: PackedSegment, tokens: int, dtype: torch.dtype) -> list[Segment]:
    """The first `tokens` tokens of pages, all in use; a page that is cut is decoded."""
    whole, rest = divmod(min(tokens, pages.tokens), PAGE_TOKENS)
    clipped: list[Segment] = [PackedSegment(*pages.narrow(0, whole))] if whole else []
    if rest:
        cut = decode_segment(PackedSegment(*pages.narrow(whole, whole + 1)), dtype)
        clipped.append(first(cut, rest))
    return clipped


def decode_segment(segment: Segment, dtype: torch.dtype) -> DenseSegment:
    """The tokens of a segment as they are, or decoded to `dtype`."""
    if isinstance(segment, DenseSegment):
        return segment
    return DenseSegment(_keys(segment, dtype), _values(segment, dtype))


def _decode(side: PackedSide, dtype: torch.dtype) -> torch.Tensor:
    return side.codec.decode(side.planes, side.transform, dtype)


def _keys(segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    return segment.keys if isinstance(segment, DenseSegment) else _decode(segment.whole_keys(), dtype)


def _values(segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    return segment.values if isinstance(segment, DenseSegment) else _decode(segment.whole_values(), dtype)
