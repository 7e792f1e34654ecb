"""What the plan of a step is made from, and where it is written."""

from dataclasses import dataclass

import torch
from torch import Tensor

NEWEST = 2
"""Newest blocks of a request that have recent pages."""

RECENT_TOKENS = 128
"""Least number of last tokens that are read in 16 bits, where their pages are still there."""

NULL_BLOCK = 0
"""A block that holds nobody's tokens; requests in it are padding."""


@dataclass(frozen=True, eq=False)
class BlockMaps:
    """Which blocks have copies of their tokens in 16 bits; a pair counts while both sides name each other.

    Args:
        page_of: [blocks + 1] int32, recent page of a block, or -1; the last element is nobody's.
        block_of: [pages + 1] int32, block of a recent page, or -1.
        entry_of: [blocks + 1] int32, sink entry of a first block, or -1.
        first_of: [entries + 1] int32, first block of a sink entry, or -1.
        used: [entries + 1] int32, the last step in which a request read the entry.
        sinks: tokens of a sink entry.
    """

    page_of: Tensor
    block_of: Tensor
    entry_of: Tensor
    first_of: Tensor
    used: Tensor
    sinks: int

    @property
    def blocks(self) -> int:
        return self.page_of.shape[0] - 1

    def pages(self, blocks: Tensor) -> Tensor:
        """Recent pages of blocks, any shape int64; -1 for those that have none."""
        return _paired(self.page_of, self.block_of, blocks)

    def entries(self, blocks: Tensor) -> Tensor:
        """Sink entries of first blocks, any shape int64; -1 for those that have none."""
        return _paired(self.entry_of, self.first_of, blocks)

    def begin(self, blocks: Tensor, pages: Tensor, begun: Tensor) -> None:
        """Give blocks [n] int64 the pages [n] int64, where `begun` [n]."""
        self.page_of[blocks.where(begun, -1)] = pages.to(torch.int32)
        self.block_of[pages.where(begun, -1)] = blocks.to(torch.int32)


def _paired(one: Tensor, other: Tensor, index: Tensor) -> Tensor:
    found = one[index].long()
    return found.where((found >= 0) & (other[found] == index), -1)


@dataclass(frozen=True, eq=False)
class StepRequests:
    """The requests of a step, R of them, the first `decodes` of which have at most `queries` new tokens.

    Args:
        starts: [R + 1] int32, first new token of each request in the batch.
        lengths: [R] int32, tokens of each request, the new ones included; 0 for padding.
        block_table: [R, P] int32.
        slots: [R] int64, the row of each request among the running ones; None: not known.
        decodes: number of decodes.
        queries: q; at most `PAGE_TOKENS`.
        step: counts the steps.
        uniform: whether decode r has tokens [r * q, (r + 1) * q) of the batch, or none.
        rows: [T] int64, the row r * q + i of each of the decodes' tokens; None where uniform.
    """

    starts: Tensor
    lengths: Tensor
    block_table: Tensor
    slots: Tensor | None
    decodes: int
    queries: int
    step: int
    uniform: bool
    rows: Tensor | None = None


class StepBuffers:
    """Buffers of the plan for up to `requests` decodes, at fixed addresses.

    Args:
        requests: most decodes.
        kv_heads: Hkv.
        pages: P.
        device: of all tensors.
        steps: rows of the pool of pages from block to block, and from head to head.

    Attributes:
        table: [R, Hkv, P] int32, rows of the pool, block * steps[0] + head * steps[1].
        packed_starts, packed_lengths: [R, Hkv] int32, tokens read from packed pages.
        sink_table: [R, 1] int32, sink entry; sink_lengths: [R, Hkv] int32, tokens read from it.
        recent_table: [R, 2] int32, recent pages; recent_lengths: [R, Hkv] int32, tokens read from them.
        full_pages, full_blocks: [R] int32, recent page and block of a block that this step fills; -1: none.
        written: [R, 2] int64.
    """

    def __init__(
        self, requests: int, kv_heads: int, pages: int, device: torch.device, steps: tuple[int, int]
    ) -> None:
        def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.kv_heads, self.steps = kv_heads, steps
        self.table = numbers(requests, kv_heads, pages)
        self.packed_starts, self.packed_lengths = numbers(requests, kv_heads), numbers(requests, kv_heads)
        self.sink_lengths, self.recent_lengths = numbers(requests, kv_heads), numbers(requests, kv_heads)
        self.sink_table, self.recent_table = numbers(requests, 1), numbers(requests, NEWEST)
        self.full_pages, self.full_blocks = numbers(requests), numbers(requests)
        self.written = numbers(requests, NEWEST, dtype=torch.int64)
        self._of_tokens: dict[int, tuple[Tensor, Tensor]] = {}

    def of_tokens(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Where each of so many tokens goes in recent pages and in sink entries, both [T] int32.

        page * 128 + place, or entry * sinks + place; -1: nowhere.
        """
        if tokens not in self._of_tokens:
            rows = [torch.full((tokens,), -1, dtype=torch.int32, device=self.table.device) for _ in range(2)]
            self._of_tokens[tokens] = rows[0], rows[1]
        return self._of_tokens[tokens]
