"""Packed pages of one layer: planes that grow, crop, index and move together."""

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch

from quantpress.cache.parts import Parts, portable
from quantpress.codecs.page_codec import Planes

GROWTH = 16  # appending reserves a sixteenth more pages than there are


@portable("pages")
class PageStore:
    """Planes [B, Hkv, P, ...] with room to append.

    Stores may share memory (`share`). Appending writes behind the last page in place when no other living
    store over the same memory has a page there, and moves to new memory otherwise. So nothing that a store
    holds ever changes, and what only a forgotten store held is written over. Whoever keeps `planes` keeps
    the store, or a share of it, too.

    Args:
        planes: what a codec's `encode` returned, or None for an empty store.
    """

    def __init__(self, planes: Planes | None = None) -> None:
        self._memory = _Memory(dict(planes or {}))
        self._memory.stores.add(self)
        self.pages = self._memory.pages
        self._may_write = True  # False after a crop: views may still look at what lies behind `pages`

    @property
    def planes(self) -> Planes:
        """The pages in use, as views [B, Hkv, P, ...]."""
        return {name: buffer[:, :, : self.pages] for name, buffer in self.buffers.items()}

    @property
    def buffers(self) -> Planes:
        """The planes with all their room; what lies behind `pages` is not for reading."""
        return self._memory.planes

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held, room to grow included."""
        return list(self.buffers.values())

    def append(self, planes: Planes) -> None:
        """Put pages behind the last one.

        Args:
            planes: [B, Hkv, N, ...] with the names and trailing shapes of the first ones. Where a dtype
                differs, all pages go over to the wider of the two.
        """
        added = next(iter(planes.values())).shape[2]
        if not self.buffers:
            self._take(dict(planes))
            self.pages = added
            return
        wanted = self.pages + added
        dtypes = {
            name: torch.promote_types(old.dtype, planes[name].dtype) for name, old in self.buffers.items()
        }
        wider = any(old.dtype != dtypes[name] for name, old in self.buffers.items())
        if wider or wanted > self._memory.pages or not self._at_the_end():
            self._move(max(wanted + wanted // GROWTH, wider * self._memory.pages), dtypes)
        for name, buffer in self.buffers.items():
            buffer[:, :, self.pages : wanted] = planes[name]
        self.pages = wanted

    def reserve(self, pages: int) -> None:
        """Make room, so that appending up to `pages` pages in all stays in place; an empty store has none."""
        if self.buffers and (pages > self._memory.pages or not self._at_the_end()):
            self._move(max(pages, self.pages))

    def _at_the_end(self) -> bool:
        others = (store.pages for store in self._memory.stores if store is not self)
        return self._may_write and max(others, default=0) <= self.pages

    def _move(self, pages: int, dtypes: dict[str, torch.dtype] | None = None) -> None:
        larger: Planes = {}
        with torch.inference_mode(False), torch.no_grad():  # so that any mode may write to it later
            for name, buffer in self.buffers.items():
                dtype = buffer.dtype if dtypes is None else dtypes[name]
                larger[name] = torch.empty(
                    (*buffer.shape[:2], pages, *buffer.shape[3:]), dtype=dtype, device=buffer.device
                )
                larger[name][:, :, : self.pages] = buffer[:, :, : self.pages]
                larger[name][:, :, self.pages :] = 0  # a page table names pages that there are
        self._take(larger)

    def _take(self, planes: Planes) -> None:
        self._memory.stores.discard(self)
        self._memory = _Memory(planes)
        self._memory.stores.add(self)
        self._may_write = True

    def crop(self, pages: int) -> None:
        """Keep the first `pages` pages; the rest is let go at the next append."""
        if pages == 0:
            self._take({})
        if pages < self.pages:
            self._may_write = False
        self.pages = pages

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PageStore":
        """A new store with `change` applied to every plane in use (index the batch, move, clone)."""
        return PageStore({name: change(plane) for name, plane in self.planes.items()})

    def share(self) -> "PageStore":
        """A store over the same memory, which neither of the two will change for the other."""
        other = PageStore()
        other._memory.stores.discard(other)
        other._memory, other.pages, other._may_write = self._memory, self.pages, self._may_write
        other._memory.stores.add(other)
        return other

    def parts(self) -> Parts:
        """The pages in use, for `quantpress.cache.parts`."""
        return Parts("pages", tensors=self.planes)

    @classmethod
    def from_parts(cls, parts: Parts) -> "PageStore":
        """A store of pages as they are; the first page behind them moves it to memory of its own."""
        return cls(parts.tensors)

    def __reduce__(self) -> Any:
        return PageStore, (self.planes,)


class _Memory:
    """Planes of equal page counts, and the stores that look at them."""

    def __init__(self, planes: Planes) -> None:
        self.planes = planes
        self.stores: WeakSet[PageStore] = WeakSet()

    @property
    def pages(self) -> int:
        return next(iter(self.planes.values())).shape[2] if self.planes else 0
