"""A fixed view of a packed layer's tokens: what attention reads, and what dense tensors are decoded from."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantpress.cache.segments import after, first
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
        held: what keeps the memory of the pages from being written over.
        step: the same tokens as segments at fixed addresses, with lengths on the device; None outside of a
            step (see `quantpress.cache.fixed`).
    """

    sinks: DenseSegment
    packed: PackedSegment
    recent: DenseSegment
    tokens: int
    dtype: torch.dtype
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
        """
        if self.step is not None and self.sinks.keys.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedModelError(
                "this model's attention decodes the packed keys and values as a whole; only attention that "
                "reads them packed can be captured in a CUDA graph"
            )
        sinks, pages = self.sinks.tokens, self.packed.tokens
        if self.tokens <= sinks:
            return [first(self.sinks, self.tokens)]
        inside = self.tokens - sinks
        if inside >= pages:
            return [self.sinks, self.packed, first(self.recent, inside - pages)]
        whole, rest = divmod(inside, PAGE_TOKENS)
        segments: list[Segment] = [self.sinks]
        if whole:
            segments.append(self.pages(0, whole))
        if rest:
            cut = self.pages(whole, whole + 1)
            segments.append(first(decode_segment(cut, self.dtype), rest))
        return segments

    def pages(self, start: int, stop: int) -> PackedSegment:
        """Pages `start` to `stop` alone."""
        return PackedSegment(*self.packed.narrow(start, stop))

    def gather(self, tokens: torch.Tensor) -> PackedSegment:
        """Packed tokens [B, Hkv, N], counted from the first packed one, as pages; N a multiple of 128."""
        keys, values = self.packed.keys, self.packed.values
        return PackedSegment(
            replace(keys, planes=keys.codec.gather(keys.planes, tokens)),
            replace(values, planes=values.codec.gather(values.planes, tokens)),
        )

    def newest(self, tokens: int) -> DenseSegment | None:
        """The last tokens, when all of them are recent ones; else None."""
        recent = self.recent.tokens
        whole = self.tokens == self.sinks.tokens + self.packed.tokens + recent
        return after(self.recent, recent - tokens) if whole and 0 < tokens <= recent else None

    def dense_keys(self) -> torch.Tensor:
        """Every key in view, decoded: [B, Hkv, tokens, D]."""
        return torch.cat([_keys(segment, self.dtype) for segment in self.segments()], dim=2)

    def dense_values(self) -> torch.Tensor:
        """Every value in view, decoded: [B, Hkv, tokens, Dv]."""
        return torch.cat([_values(segment, self.dtype) for segment in self.segments()], dim=2)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedView":
        """A view with `change` applied to every tensor (each has the batch first)."""

        def dense(segment: DenseSegment) -> DenseSegment:
            return DenseSegment(change(segment.keys), change(segment.values))

        def side(packed: PackedSide) -> PackedSide:
            planes = {name: change(plane) for name, plane in packed.planes.items()}
            return PackedSide(packed.codec, planes, packed.transform.map(change))

        pages = PackedSegment(side(self.packed.keys), side(self.packed.values))
        sinks, recent = dense(self.sinks), dense(self.recent)
        return replace(self, sinks=sinks, packed=pages, recent=recent, held=(), step=None)


@dataclass(frozen=True)
class DenseView:
    """The same for tokens of which none is packed yet.

    Args:
        sinks: all tokens, 16 bits.
        tokens: how many of them are in view, counted from the first.
        dtype: of the model's keys and values.
    """

    sinks: DenseSegment
    tokens: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Hkv, tokens in view)."""
        return (*self.sinks.keys.shape[:2], self.tokens)

    def narrow(self, tokens: int) -> "DenseView":
        """The first `tokens` tokens."""
        return replace(self, tokens=min(tokens, self.tokens))

    def newest(self, tokens: int) -> DenseSegment | None:
        """None: reading any token costs nothing here."""
        return None

    def dense_keys(self) -> torch.Tensor:
        """Every key in view: [B, Hkv, tokens, D]."""
        return self.sinks.keys[:, :, : self.tokens]

    def dense_values(self) -> torch.Tensor:
        """Every value in view: [B, Hkv, tokens, Dv]."""
        return self.sinks.values[:, :, : self.tokens]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "DenseView":
        """A view with `change` applied to both tensors (each has the batch first)."""
        return replace(self, sinks=DenseSegment(change(self.sinks.keys), change(self.sinks.values)))


def decode_segment(segment: Segment, dtype: torch.dtype) -> DenseSegment:
    """The tokens of a segment as they are, or decoded to `dtype`."""
    if isinstance(segment, DenseSegment):
        return segment
    return DenseSegment(_decode(segment.keys, dtype), _decode(segment.values, dtype))


def _decode(side: PackedSide, dtype: torch.dtype) -> torch.Tensor:
    return side.codec.decode(side.planes, side.transform, dtype)


def _keys(segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    return segment.keys if isinstance(segment, DenseSegment) else _decode(segment.keys, dtype)


def _values(segment: Segment, dtype: torch.dtype) -> torch.Tensor:
    return segment.values if isinstance(segment, DenseSegment) else _decode(segment.values, dtype)
