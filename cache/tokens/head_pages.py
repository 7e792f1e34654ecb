"""The pages of a layer, keys and values together: as many in every head."""

import copy
from collections.abc import Callable
from typing import Protocol

import torch

from quantpress.cache.parts import Parts, portable, rebuild
from quantpress.cache.tokens.pages import PageStore
from quantpress.codecs.page_codec import PageCodec, Planes
from quantpress.kernels.attend import PackedSegment, PackedSide
from quantpress.quantization.transform import ChannelTransform

Coded = tuple[PageCodec, ChannelTransform]
"""What keys, or values, went through before they were packed."""

Span = tuple[torch.Tensor, torch.Tensor | None]
"""Lengths and starts (None: 0) [B, Hkv] int32 of the tokens in use."""


class HeadPages(Protocol):
    """Pages of keys and values, P in the longest head.

    Attributes:
        keys, values: where the planes lie.
    """

    keys: PageStore
    values: PageStore

    @property
    def pages(self) -> int:
        """P."""
        ...

    def append(self, keys: Planes, values: Planes) -> None:
        """Put pages [B, Hkv, N, ...] behind the last one of every head."""
        ...

    def reserve(self, pages: int) -> None:
        """Make room, so that appending up to `pages` pages in all stays in place."""
        ...

    def crop(self, pages: int) -> None:
        """Keep the first `pages` of the P pages."""
        ...

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "HeadPages":
        """The same pages with every tensor moved or copied."""
        ...

    def select(self, entries: torch.Tensor) -> "HeadPages":
        """The pages of batch entries [B'] int64."""
        ...

    def share(self) -> "HeadPages":
        """The same pages over the same memory, which neither of the two will change for the other."""
        ...

    def segment(self, keys: Coded, values: Coded, span: Span | None, room: bool = False) -> PackedSegment:
        """What attention reads; with `room`, all the room there is, of which `span` says what is in use."""
        ...

    def metadata(self) -> list[torch.Tensor]:
        """The tensors beside the planes."""
        ...

    def parts(self) -> Parts:
        """What they are made of, to be saved."""
        ...


@portable("even_pages")
class EvenPages:
    """`HeadPages` of planes [B, Hkv, P, ...]: P pages in every head."""

    def __init__(self) -> None:
        self.keys, self.values = PageStore(), PageStore()

    @property
    def pages(self) -> int:
        return self.keys.pages

    def append(self, keys: Planes, values: Planes) -> None:
        self.keys.append(keys)
        self.values.append(values)

    def reserve(self, pages: int) -> None:
        self.keys.reserve(pages)
        self.values.reserve(pages)

    def crop(self, pages: int) -> None:
        self.keys.crop(pages)
        self.values.crop(pages)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "EvenPages":
        return self._of(self.keys.map(change), self.values.map(change))

    def select(self, entries: torch.Tensor) -> "EvenPages":
        return self.map(lambda plane: plane.index_select(0, entries))

    def share(self) -> "EvenPages":
        return self._of(self.keys.share(), self.values.share())

    def gather(self, codecs: tuple[PageCodec, PageCodec], tokens: torch.Tensor) -> "EvenPages":
        """New pages of the tokens [B, Hkv, N] int64, N a multiple of 128, with the codes that they have."""
        if not tokens.shape[2]:
            return EvenPages()
        stores = zip(codecs, (self.keys, self.values), strict=True)
        return self._of(*(PageStore(codec.gather(store.planes, tokens)) for codec, store in stores))

    def segment(self, keys: Coded, values: Coded, span: Span | None, room: bool = False) -> PackedSegment:
        lengths, starts = span or (None, None)
        planes = [store.buffers if room else store.planes for store in (self.keys, self.values)]
        sides = PackedSide(keys[0], planes[0], keys[1]), PackedSide(values[0], planes[1], values[1])
        return PackedSegment(*sides, lengths=lengths, starts=starts)

    def metadata(self) -> list[torch.Tensor]:
        return []

    def parts(self) -> Parts:
        return Parts("even_pages", inner={"keys": self.keys.parts(), "values": self.values.parts()})

    @classmethod
    def from_parts(cls, parts: Parts) -> "EvenPages":
        """The pages that `parts` took apart."""
        return cls()._of(*(rebuild(parts.inner[side], "pages") for side in ("keys", "values")))

    def _of(self, keys: PageStore, values: PageStore) -> "EvenPages":
        other = copy.copy(self)
        other.keys, other.values = keys, values
        return other
