"""The pages of a layer whose heads have different numbers of them: a pool and a table.

Each row of the pool is one page of one head, each head has the rows that its line of the table names. Heads
are aligned at their ends: page p of the P pages is followed by the same number of pages in every head, and a
head with fewer than P has none in front. So whole pages are appended, and taken away, behind all heads alike.

Rows never change. Batch entries that stand for the same tokens (beams) therefore share them, and selecting
batch entries changes the table alone. Rows that no line names any more are given back when they are more than
one in `SLACK`.
"""

import copy
from collections.abc import Callable

import torch

from quantpress.cache.parts import Parts, portable, rebuild
from quantpress.cache.tokens.head_pages import Coded, Span
from quantpress.cache.tokens.pages import PageStore
from quantpress.codecs.page_codec import Planes
from quantpress.kernels.attend import PackedSegment, PackedSide

SLACK = 16


@portable("ragged_pages")
class RaggedPages:
    """`HeadPages` in a pool.

    Args:
        keys: planes [B, Hkv, P, ...], P the pages of the longest head; empty for P = 0.
        values: planes [B, Hkv, P, ...].
        held: [B, Hkv, P] bool, which of them there are. A head's last page is page P - 1, unless it has none.

    Attributes:
        keys, values: planes [1, 1, N, ...] of N pages of single heads.
        rows: one plane, the table.
    """

    def __init__(self, keys: Planes, values: Planes, held: torch.Tensor) -> None:
        by_page = held.permute(2, 0, 1)  # pages that are appended together lie together
        rows = torch.zeros(by_page.shape, dtype=torch.int32, device=held.device)
        rows[by_page] = torch.arange(int(held.sum()), dtype=torch.int32, device=held.device)
        self.rows = _stored(rows.permute(1, 2, 0))
        self.keys, self.values = (PageStore(_rows(planes, by_page)) for planes in (keys, values))

    @property
    def table(self) -> torch.Tensor:
        """[B, Hkv, P] int32, the row of each page; 0 where there is no page."""
        return self.rows.planes["table"]

    @property
    def pages(self) -> int:
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

    def segment(self, keys: Coded, values: Coded, span: Span | None, room: bool = False) -> PackedSegment:
        assert span is not None

        def planes(store: PageStore) -> Planes:
            return store.buffers if room else store.planes

        def side(coded: Coded, store: PageStore) -> PackedSide:
            return PackedSide(
                coded[0], {name: plane[0, 0] for name, plane in planes(store).items()}, coded[1]
            )

        sides, table = (side(keys, self.keys), side(values, self.values)), planes(self.rows)["table"]
        return PackedSegment(*sides, lengths=span[0], table=table, starts=span[1])

    def metadata(self) -> list[torch.Tensor]:
        return self.rows.tensors

    def parts(self) -> Parts:
        pools = {"keys": self.keys.parts(), "values": self.values.parts()}
        return Parts("ragged_pages", tensors={"table": self.table}, inner=pools)

    @classmethod
    def from_parts(cls, parts: Parts) -> "RaggedPages":
        """The pages that `parts` took apart."""
        keys, values = (rebuild(parts.inner[side], "pages") for side in ("keys", "values"))
        return cls.__new__(cls)._with(keys, values, _stored(parts.tensors["table"]))

    def _tidy(self) -> None:
        """Give back rows at the end of the pool that no head has, and all of them when they are many."""
        used = self.table.flatten().unique().long()  # ascending
        end = int(used[-1]) + 1 if len(used) else 0
        if len(used) * SLACK >= end * (SLACK - 1):
            self.keys.crop(end)
            self.values.crop(end)
            return
        place = torch.zeros(end, dtype=torch.int32, device=used.device)
        place[used] = torch.arange(len(used), dtype=torch.int32, device=used.device)
        self.rows = self.rows.map(lambda table: place[table.long()])
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


def _rows(planes: Planes, held: torch.Tensor) -> Planes:
    """Planes [B, Hkv, P, ...] where `held` [P, B, Hkv], in its order: [1, 1, N, ...]."""
    return {name: plane.movedim(2, 0)[held][None, None] for name, plane in planes.items()}
