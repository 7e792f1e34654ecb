"""The pages of a layer whose heads have different numbers of them: a pool of pages and a page table.

Each row of the pool is one page of one head. The table names the rows of each head. Heads are aligned at
their ends: page p of the P pages is followed by the same number of pages in every head, and a head with fewer
than P pages has none at the start. So whole pages are appended to, and removed from, all heads alike.

Rows never change. Batch entries with the same tokens (beams) therefore share them, and selecting batch
entries changes only the table. Rows that the table no longer names are freed when they are more than one in
`SLACK`.
"""

import copy
from collections.abc import Callable

import torch

from quantpress.cache.tokens.pages import Encoding, PageStore, Span
from quantpress.codecs.parts import Parts, portable, rebuild
from quantpress.codecs.protocol import Planes
from quantpress.kernels.attend import PackedSegment, PackedSide

SLACK = 16


@portable("ragged_pages")
class RaggedPages:
    """Pages in a pool with a page table. Methods are those of `RectangularPages`.

    Args:
        keys: planes [B, Hkv, P, ...], P the pages of the longest head; empty for P = 0.
        values: planes [B, Hkv, P, ...].
        in_use: [B, Hkv, P] bool, True for the pages that are kept. A head's last page is page P - 1, unless
            it has none.

    Attributes:
        keys: pool of N pages of single heads, planes [1, 1, N, ...].
        values: the same for the values.
        rows: the page table, as a store with one plane.
    """

    def __init__(self, keys: Planes, values: Planes, in_use: torch.Tensor) -> None:
        by_page = in_use.permute(2, 0, 1)  # pages that are appended together are adjacent
        rows = torch.zeros(by_page.shape, dtype=torch.int32, device=in_use.device)
        rows[by_page] = torch.arange(int(in_use.sum()), dtype=torch.int32, device=in_use.device)
        self.rows = _stored(rows.permute(1, 2, 0))
        self.keys, self.values = (PageStore(_rows(planes, by_page)) for planes in (keys, values))

    @property
    def table(self) -> torch.Tensor:
        """[B, Hkv, P] int32, the row of each page in the pool; 0 where a head has no page."""
        return self.rows.planes["table"]

    @property
    def pages(self) -> int:
        """P."""
        return self.rows.pages

    def append(self, keys: Planes, values: Planes) -> None:
        first = self.keys.pages
        added = next(iter(keys.values())).shape[:3]
        every = torch.ones(added, dtype=torch.bool, device=self.table.device).permute(2, 0, 1)
        self.keys.append(_rows(keys, every))
        self.values.append(_rows(values, every))
        rows = torch.arange(first, self.keys.pages, dtype=torch.int32, device=self.table.device)
        self.rows.append({"table": rows.view(every.shape).permute(1, 2, 0)})

    def reserve(self, pages: int) -> None:
        heads = self.table.shape[0] * self.table.shape[1]
        rows = self.keys.pages + max(0, pages - self.pages) * heads
        self.keys.reserve(rows)
        self.values.reserve(rows)
        self.rows.reserve(pages)

    def crop(self, pages: int) -> None:
        self.rows = _stored(self.table[:, :, :pages])
        self._tidy()

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RaggedPages":
        return self._of(self.keys.map(change), self.values.map(change), self.rows.map(change))

    def select(self, entries: torch.Tensor) -> "RaggedPages":
        rows = self.rows.map(lambda table: table.index_select(0, entries))
        other = self._of(self.keys.share(), self.values.share(), rows)
        other._tidy()
        return other

    def share(self) -> "RaggedPages":
        return self._of(self.keys.share(), self.values.share(), self.rows.share())

    def segment(
        self, keys: Encoding, values: Encoding, span: Span | None, to_capacity: bool = False
    ) -> PackedSegment:
        lengths, starts = span or (None, None)

        def planes(store: PageStore) -> Planes:
            return store.buffers if to_capacity else store.planes

        def side(encoding: Encoding, store: PageStore) -> PackedSide:
            pool = {name: plane[0, 0] for name, plane in planes(store).items()}
            return PackedSide(encoding[0], pool, encoding[1])

        sides, table = (side(keys, self.keys), side(values, self.values)), planes(self.rows)["table"]
        return PackedSegment(*sides, lengths=lengths, table=table, starts=starts)

    def metadata(self) -> list[torch.Tensor]:
        """The page table."""
        return self.rows.tensors

    def parts(self) -> Parts:
        pools = {"keys": self.keys.parts(), "values": self.values.parts()}
        return Parts("ragged_pages", tensors={"table": self.table}, inner=pools)

    @classmethod
    def from_parts(cls, parts: Parts) -> "RaggedPages":
        """The pages that `parts` describes."""
        keys, values = (rebuild(parts.inner[side], "pages") for side in ("keys", "values"))
        return cls.__new__(cls)._with(keys, values, _stored(parts.tensors["table"]))

    def _tidy(self) -> None:
        """Free unused rows at the end of the pool; move the others together if too many are unused."""
        used = self.table.flatten().unique().long()  # ascending
        end = int(used[-1]) + 1 if len(used) else 0
        if len(used) * SLACK >= end * (SLACK - 1):
            self.keys.crop(end)
            self.values.crop(end)
            return
        new_row = torch.zeros(end, dtype=torch.int32, device=used.device)
        new_row[used] = torch.arange(len(used), dtype=torch.int32, device=used.device)
        self.rows = self.rows.map(lambda table: new_row[table.long()])
        self.keys, self.values = (
            PageStore({name: plane[:, :, used] for name, plane in store.planes.items()})
            for store in (self.keys, self.values)
        )

    def _of(self, keys: PageStore, values: PageStore, rows: PageStore) -> "RaggedPages":
        return copy.copy(self)._with(keys, values, rows)

    def _with(self, keys: PageStore, values: PageStore, rows: PageStore) -> "RaggedPages":
        self.keys, self.values, self.rows = keys, values, rows
        return self


def _stored(table: torch.Tensor) -> PageStore:
    return PageStore({"table": table.contiguous()})


def _rows(planes: Planes, in_use: torch.Tensor) -> Planes:
    """The pages of planes [B, Hkv, P, ...] where `in_use` [P, B, Hkv] is True, as a pool [1, 1, N, ...]."""
    return {name: plane.movedim(2, 0)[in_use][None, None] for name, plane in planes.items()}
