"""Views of a layer's tokens: what attention reads at one moment, and what dense tensors are decoded from.

If heads keep different tokens, a dense tensor has one entry for every slot of the layer: the sinks of a head
first, its other tokens last, and zeros between them for evicted tokens (see `PackedView.evicted`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantpress.cache.tokens.head_lengths import HeadLengths
from quantpress.cache.tokens.segments import (
    after,
    decode_keys,
    decode_segment,
    decode_values,
    first,
    first_packed,
    select_dense,
    select_packed,
)
from quantpress.errors import UnsupportedModelError
from quantpress.kernels.attend import DenseSegment, PackedSegment, Segment
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True)
class DenseView:
    """The tokens of a layer that has packed none of them yet. It is read like a `PackedView`.

    Args:
        sinks: all tokens, in 16 bits.
        tokens: tokens in view, counted from the first.
        dtype: dtype of the model's keys and values.
    """

    sinks: DenseSegment
    tokens: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Hkv, tokens in view)."""
        return (*self.sinks.keys.shape[:2], self.tokens)

    def narrow(self, tokens: int) -> "DenseView":
        """A view of the first `tokens` tokens."""
        return replace(self, tokens=min(tokens, self.tokens))

    def newest(self, tokens: int) -> DenseSegment | None:
        """Always None: these tokens need no shortcut, because reading them decodes nothing."""
        return None

    def dense_keys(self) -> torch.Tensor:
        """Every key in view: [B, Hkv, tokens, D]."""
        return self.sinks.keys[:, :, : self.tokens]

    def dense_values(self) -> torch.Tensor:
        """Every value in view: [B, Hkv, tokens, Dv]."""
        return self.sinks.values[:, :, : self.tokens]

    def select(self, entries: torch.Tensor) -> "DenseView":
        """A view of batch entries [B'] int64."""
        return replace(self, sinks=select_dense(self.sinks, entries))


@dataclass(frozen=True)
class PackedView:
    """Sinks, packed pages and recent tokens of a layer at one moment.

    Args:
        sinks: the first tokens, in 16 bits.
        packed: the pages.
        recent: the last tokens, in 16 bits.
        tokens: tokens in view, counted from the first.
        dtype: dtype of the model's keys and values.
        demoted: pages of fewer bits behind the sinks, or None.
        heads: how many tokens each head keeps; None: all.
        for_attention: refuse dense tensors if heads keep different tokens, because attention over them could
            not tell evicted tokens from others.
        owners: objects that keep the memory of the pages from being reused.
        step: the same tokens as segments at fixed addresses, with lengths on the device; None outside of a
            decode step at fixed addresses.
    """

    sinks: DenseSegment
    packed: PackedSegment
    recent: DenseSegment
    tokens: int
    dtype: torch.dtype
    demoted: PackedSegment | None = None
    heads: HeadLengths | None = None
    for_attention: bool = False
    owners: tuple[object, ...] = ()
    step: tuple[Segment, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Hkv, tokens in view)."""
        return (*self.sinks.keys.shape[:2], self.tokens)

    def narrow(self, tokens: int) -> "PackedView":
        """A view of the first `tokens` tokens."""
        return self if tokens >= self.tokens else replace(self, tokens=tokens, step=None)

    def segments(self) -> list[Segment]:
        """The tokens in view as attention segments; a page that is cut is decoded.

        Raises:
            UnsupportedModelError: a step is being captured, which must not depend on the present number of
                tokens.
            InvalidInputError: the view ends among tokens that single heads have evicted.
        """
        if self.step is not None and self.sinks.keys.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedModelError(
                "this model's attention decodes the packed keys and values as a whole; only attention that "
                "reads them packed can be captured in a CUDA graph"
            )
        left = self.tokens
        if self.heads is not None:
            self.heads.check_whole(self.tokens)
            left -= self.heads.evicted
        sinks = first(self.sinks, min(left, self.sinks.tokens))
        segments: list[Segment] = [sinks if self.heads is None else self.heads.counted_sinks(sinks)]
        left -= self.sinks.tokens
        if self.demoted is not None and left > 0:
            segments += first_packed(self.demoted, left, self.dtype)
            left -= self.demoted.tokens
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

    def _counted(self, tokens: DenseSegment, start: int, count: int) -> DenseSegment:
        """The first `count` tokens, with those in use of each head.

        They begin at index `start` of the pages and recent tokens.
        """
        part = first(tokens, count)
        if self.heads is None or self.heads.most_padding <= start:
            return part
        lengths, starts = self.heads.span(start, start + count)
        return replace(part, lengths=lengths, starts=starts)

    def pages(self, start: int, stop: int) -> PackedSegment:
        """Pages `start` to `stop` alone, planes [B, Hkv, n, ...]."""
        span = None if self.heads is None else self.heads.span(start * PAGE_TOKENS, stop * PAGE_TOKENS)
        lengths, starts = span or (None, None)
        return PackedSegment(*self.packed.narrow(start, stop), lengths=lengths, starts=starts)

    def gather(self, tokens: torch.Tensor) -> PackedSegment:
        """New pages of packed tokens [B, Hkv, N] int64, counted from the first page; N a multiple of 128."""
        keys, values = self.packed.whole_keys(), self.packed.whole_values()
        return PackedSegment(
            replace(keys, planes=keys.codec.gather(keys.planes, tokens)),
            replace(values, planes=values.codec.gather(values.planes, tokens)),
        )

    def newest(self, tokens: int) -> DenseSegment | None:
        """The last `tokens` tokens if all of them are recent ones in every head, else None."""
        recent, heads = self.recent.tokens, self.heads
        evicted = 0 if heads is None else heads.evicted
        demoted = 0 if self.demoted is None else self.demoted.tokens
        whole = self.tokens == self.sinks.tokens + demoted + self.packed.tokens + recent + evicted
        kept = heads is None or self.tokens - tokens >= heads.whole_from
        return after(self.recent, recent - tokens) if whole and kept and 0 < tokens <= recent else None

    def evicted(self) -> torch.Tensor | None:
        """[B, Hkv, tokens] bool, True for slots whose token a head has evicted; None: no head has.

        Raises:
            InvalidInputError: the view ends among tokens that single heads have evicted.
        """
        if self.heads is None:
            return None
        self.heads.check_whole(self.tokens)
        sinks = self.sinks.tokens
        rest = self.tokens - self.heads.evicted - sinks
        kept = self._by_slot(
            self.heads.sinks_in_use(sinks).unsqueeze(-1), self.heads.in_use(0, rest).unsqueeze(-1)
        )
        return ~kept.squeeze(-1)

    def dense_keys(self) -> torch.Tensor:
        """Every key in view, decoded: [B, Hkv, tokens, D].

        Raises:
            UnsupportedModelError: heads keep different tokens; see `for_attention`.
        """
        return self._dense(decode_keys)

    def dense_values(self) -> torch.Tensor:
        """Every value in view, decoded: [B, Hkv, tokens, Dv].

        Raises:
            UnsupportedModelError: heads keep different tokens; see `for_attention`.
        """
        return self._dense(decode_values)

    def _dense(self, decode: Callable[[Segment, torch.dtype], torch.Tensor]) -> torch.Tensor:
        segments = [one for one in self.segments() if one.tokens or isinstance(one, DenseSegment)]
        if self.heads is not None and self.for_attention:
            raise UnsupportedModelError(
                "heads of this layer keep different tokens, and this model's attention reads them as one "
                "tensor, in which evicted tokens cannot be marked; use a press that evicts as many in each "
                'head, such as SnapKV, or load the model with attn_implementation="sdpa"'
            )
        states = torch.cat([decode(segment, self.dtype) for segment in segments], dim=2)
        if self.heads is None:
            return states
        sinks, rest = states.split([self.sinks.tokens, states.shape[2] - self.sinks.tokens], dim=2)
        in_use = self.heads.sinks_in_use(sinks.shape[2]), self.heads.in_use(0, rest.shape[2])
        parts = [
            part.masked_fill(~used.unsqueeze(-1), 0) for part, used in zip((sinks, rest), in_use, strict=True)
        ]
        return self._by_slot(*parts)

    def _by_slot(self, sinks: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """[B, Hkv, tokens, D]: sinks at the start, the rest at the end, zeros between them."""
        out = sinks.new_zeros(*sinks.shape[:2], self.tokens, sinks.shape[-1])
        count = min(self.tokens, rest.shape[2])
        out[:, :, self.tokens - count :] = rest[:, :, rest.shape[2] - count :]
        out[:, :, : sinks.shape[2]] += sinks[:, :, : self.tokens]
        return out

    def select(self, entries: torch.Tensor) -> "PackedView":
        """A view of batch entries [B'] int64."""
        return replace(
            self,
            sinks=select_dense(self.sinks, entries),
            packed=select_packed(self.packed, entries),
            demoted=None if self.demoted is None else select_packed(self.demoted, entries),
            recent=select_dense(self.recent, entries),
            heads=None if self.heads is None else self.heads.map(lambda t: t.index_select(0, entries)),
            owners=self.owners if self.packed.table is not None else (),
            step=None,
        )
