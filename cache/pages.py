"""Packed pages of one layer: planes that grow, crop, index and move together."""

from collections.abc import Callable

import torch

from quantpress.kernels.page_codec import Planes

GROWTH = 16  # appending reserves a sixteenth more pages than there are


class PageStore:
    """Planes [B, Hkv, P, ...] with room to append.

    Views handed out by `planes` never change afterwards: appending writes only behind them, and after a crop
    the next append moves to new memory.

    Args:
        planes: what a codec's `encode` returned, or None for an empty store.
    """

    def __init__(self, planes: Planes | None = None) -> None:
        self._buffers: Planes = dict(planes) if planes else {}
        self.pages = next(iter(self._buffers.values())).shape[2] if self._buffers else 0
        self._may_write = True  # False after a crop: others may still look at what lies behind `pages`

    @property
    def planes(self) -> Planes:
        """The pages in use, as views [B, Hkv, P, ...]."""
        return {name: buffer[:, :, : self.pages] for name, buffer in self._buffers.items()}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor held, room to grow included."""
        return list(self._buffers.values())

    def append(self, planes: Planes) -> None:
        """Put pages behind the last one.

        Args:
            planes: [B, Hkv, N, ...] with the names, dtypes and trailing shapes of the first ones.
        """
        added = next(iter(planes.values())).shape[2]
        if not self._buffers:
            self._buffers, self.pages = dict(planes), added
            return
        wanted = self.pages + added
        capacity = next(iter(self._buffers.values())).shape[2]
        if wanted > capacity or not self._may_write:
            self._move(wanted + wanted // GROWTH)
        for name, buffer in self._buffers.items():
            buffer[:, :, self.pages : wanted] = planes[name]
        self.pages = wanted

    def _move(self, capacity: int) -> None:
        for name, buffer in self._buffers.items():
            larger = buffer.new_empty((*buffer.shape[:2], capacity, *buffer.shape[3:]))
            larger[:, :, : self.pages] = buffer[:, :, : self.pages]
            self._buffers[name] = larger
        self._may_write = True

    def crop(self, pages: int) -> None:
        """Keep the first `pages` pages; the rest is let go at the next append."""
        if pages == 0:
            self._buffers = {}
        if pages < self.pages:
            self._may_write = False
        self.pages = pages

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PageStore":
        """A new store with `change` applied to every plane in use (index the batch, move, clone)."""
        return PageStore({name: change(plane) for name, plane in self.planes.items()})

    def share(self) -> "PageStore":
        """A store over the same memory; whichever of the two appends next moves to new memory first."""
        other = PageStore()
        other._buffers, other.pages = dict(self._buffers), self.pages
        self._may_write = other._may_write = False
        return other
