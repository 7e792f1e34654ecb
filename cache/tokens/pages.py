"""The packed pages of one layer.

A `PageStore` holds the pages of the keys, or of the values, as planes: one tensor for each kind of data, such
as codes and scales. `RectangularPages` holds a store of keys and one of values, for a layer whose heads all
have the same number of pages. `quantpress.cache.tokens.ragged_pages` is for heads with different numbers.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F

from quantpress.codecs.parts import Parts, portable, rebuild
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.kernels.attend import PackedSegment, PackedSide
from quantpress.quantization.transform import ChannelTransform

GROWTH = 16  # appending reserves a sixteenth more pages than there are

Encoding = tuple[PageCodec, ChannelTransform]
"""The codec and the channel transform that keys, or values, were encoded with."""

Span = tuple[torch.Tensor, torch.Tensor | None]
"""Lengths and starts (None: 0), [B, Hkv] int32, of the tokens in use."""


@portable("pages")
class PageStore:
    """Planes [B, Hkv, P, ...] with spare capacity to append to.

    Stores may share memory (see `share`). `append` writes in place behind the last page if no other living
    store over the same memory has a page there; otherwise it moves to new memory. So the pages of a store
    never change, and memory that only a deleted store used is reused. Whoever keeps `planes` must also keep
    the store, or a share of it.

    Args:
        planes: the result of a codec's `encode`, or None for an empty store.

    Attributes:
        pages: P, the pages in use.
    """

    def __init__(self, planes: Planes | None = None) -> None:
        self._memory = _Memory(dict(planes or {}))
        self._memory.stores.add(self)
        self.pages = self._memory.pages
        self._may_write = True  # False after a crop: views may still read the pages behind the last one

    @property
    def planes(self) -> Planes:
        """The pages in use, as views [B, Hkv, P, ...]."""
        if self.pages == self._memory.pages:
            return dict(self.buffers)
        return {name: buffer.narrow(2, 0, self.pages) for name, buffer in self.buffers.items()}

    @property
    def buffers(self) -> Planes:
        """The planes with their spare capacity, which holds no valid pages."""
        return self._memory.planes

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held, spare capacity included."""
        return list(self.buffers.values())

    def append(self, planes: Planes) -> None:
        """Append pages.

        Args:
            planes: [B, Hkv, N, ...] with the names and trailing shapes of the planes already here. If a dtype
                differs, all pages are converted to the wider of the two.
        """
        added = next(iter(planes.values())).shape[2]
        if not self.buffers:
            self._use(dict(planes))
            self.pages = added
            return
        wanted = self.pages + added
        dtypes = {
            name: torch.promote_types(old.dtype, planes[name].dtype) for name, old in self.buffers.items()
        }
        wider = any(old.dtype != dtypes[name] for name, old in self.buffers.items())
        if wider or wanted > self._memory.pages or not self._owns_end():
            self._reallocate(max(wanted + wanted // GROWTH, wider * self._memory.pages), dtypes)
        for name, buffer in self.buffers.items():
            buffer[:, :, self.pages : wanted] = planes[name]
        self.pages = wanted

    def reserve(self, pages: int) -> None:
        """Allocate capacity for `pages` pages in all; appending up to it does not move the buffers.

        An empty store does not know the shape of its planes and stays as it is.
        """
        if self.buffers and (pages > self._memory.pages or not self._owns_end()):
            self._reallocate(max(pages, self.pages))

    def _owns_end(self) -> bool:
        """Whether the memory behind the last page is this store's to write to."""
        others = (store.pages for store in self._memory.stores if store is not self)
        return self._may_write and max(others, default=0) <= self.pages

    def _reallocate(self, pages: int, dtypes: dict[str, torch.dtype] | None = None) -> None:
        """Move the pages in use to new memory for `pages` pages, which any mode may write to."""
        larger: Planes = {}
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            for name, buffer in self.buffers.items():
                used = buffer.narrow(2, 0, self.pages)
                used = used if dtypes is None else used.to(dtypes[name])
                spare = [0, 0] * (buffer.dim() - 3) + [0, pages - self.pages]
                larger[name] = F.pad(used, spare)  # 0, so that a page table never names undefined rows
        self._use(larger)

    def _use(self, planes: Planes) -> None:
        self._memory.stores.discard(self)
        self._memory = _Memory(planes)
        self._memory.stores.add(self)
        self._may_write = True

    def crop(self, pages: int) -> None:
        """Keep the first `pages` pages. The memory of the others is freed at the next append."""
        if pages == 0:
            self._use({})
        if pages < self.pages:
            self._may_write = False
        self.pages = pages

    def narrow(self, planes: Mapping[int, torch.Tensor]) -> None:
        """Replace the buffers whose ids are named; other ids are passed over."""
        self.buffers.update({name: planes[id(b)] for name, b in self.buffers.items() if id(b) in planes})

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PageStore":
        """A new store with `change` (index the batch, move, clone) applied to the pages in use."""
        return PageStore({name: change(plane) for name, plane in self.planes.items()})

    def share(self) -> "PageStore":
        """A store over the same memory. Changes to one of the two do not show in the other."""
        other = object.__new__(PageStore)
        other._memory, other.pages, other._may_write = self._memory, self.pages, self._may_write
        other._memory.stores.add(other)
        return other

    def parts(self) -> Parts:
        """The pages in use, in the form in which they are saved."""
        return Parts("pages", tensors=self.planes)

    @classmethod
    def from_parts(cls, parts: Parts) -> "PageStore":
        """A store over the tensors of `parts`; the first append copies them."""
        return cls(parts.tensors)

    def __reduce__(self) -> Any:
        return PageStore, (self.planes,)


class _Memory:
    """Planes with the same number of pages, and the stores that read them."""

    def __init__(self, planes: Planes) -> None:
        self.planes = planes
        self.stores: WeakSet[PageStore] = WeakSet()

    @property
    def pages(self) -> int:
        return next(iter(self.planes.values())).shape[2] if self.planes else 0


@portable("even_pages")
class RectangularPages:
    """The pages of a layer whose heads all have the same number: planes [B, Hkv, P, ...].

    Attributes:
        keys: the pages of the keys.
        values: the pages of the values.
    """

    def __init__(self) -> None:
        self.keys, self.values = PageStore(), PageStore()

    @property
    def pages(self) -> int:
        """P."""
        return self.keys.pages

    def append(self, keys: Planes, values: Planes) -> None:
        """Append pages [B, Hkv, N, ...] to every head."""
        self.keys.append(keys)
        self.values.append(values)

    def reserve(self, pages: int) -> None:
        """Allocate capacity for `pages` pages in all; see `PageStore.reserve`."""
        self.keys.reserve(pages)
        self.values.reserve(pages)

    def crop(self, pages: int) -> None:
        """Keep the first `pages` pages of every head."""
        self.keys.crop(pages)
        self.values.crop(pages)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RectangularPages":
        """The same pages with every tensor moved, copied or indexed in the batch."""
        return self._of(self.keys.map(change), self.values.map(change))

    def select(self, entries: torch.Tensor) -> "RectangularPages":
        """The pages of batch entries [B'] int64."""
        return self.map(lambda plane: plane.index_select(0, entries))

    def share(self) -> "RectangularPages":
        """The same pages over the same memory; see `PageStore.share`."""
        return self._of(self.keys.share(), self.values.share())

    def gather(self, codecs: tuple[PageCodec, PageCodec], tokens: torch.Tensor) -> "RectangularPages":
        """New pages of the tokens [B, Hkv, N] int64, N a multiple of 128. Their codes do not change."""
        if not tokens.shape[2]:
            return RectangularPages()
        stores = zip(codecs, (self.keys, self.values), strict=True)
        return self._of(*(PageStore(codec.gather(store.planes, tokens)) for codec, store in stores))

    def segment(
        self, keys: Encoding, values: Encoding, span: Span | None, to_capacity: bool = False
    ) -> PackedSegment:
        """The pages as attention reads them.

        Args:
            keys: how the keys were encoded.
            values: how the values were encoded.
            span: tokens in use; None: all.
            to_capacity: include spare capacity, so that the addresses stay valid while pages are appended.
        """
        lengths, starts = span or (None, None)
        planes = [store.buffers if to_capacity else store.planes for store in (self.keys, self.values)]
        sides = PackedSide(keys[0], planes[0], keys[1]), PackedSide(values[0], planes[1], values[1])
        return PackedSegment(*sides, lengths=lengths, starts=starts)

    def metadata(self) -> list[torch.Tensor]:
        """The tensors held beside the planes: none."""
        return []

    def parts(self) -> Parts:
        """The pages in the form in which they are saved."""
        return Parts("even_pages", inner={"keys": self.keys.parts(), "values": self.values.parts()})

    @classmethod
    def from_parts(cls, parts: Parts) -> "RectangularPages":
        """The pages that `parts` describes."""
        return cls()._of(*(rebuild(parts.inner[side], "pages") for side in ("keys", "values")))

    def _of(self, keys: PageStore, values: PageStore) -> "RectangularPages":
        other = copy.copy(self)
        other.keys, other.values = keys, values
        return other
