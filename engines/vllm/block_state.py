"""Which blocks have copies of their tokens in 16 bits, and where.

The newest tokens of a request lie in *recent pages* of 128 tokens, the first tokens of a prompt in *sink entries*,
both in pools beside vLLM's cache. vLLM shares and recycles blocks and tells nobody, so every copy is found from its
block: `page_of[block]` names a page, and counts only while `block_of[page]` names the block again. Whoever writes to
a block from its first token on, or takes a page for another block, thereby ends the old pair.

With slots (vLLM's rows of running requests) a request has two pages of its own, used in turn. Without, on a CPU,
a page is taken from whoever has not used one for longest.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.errors import QuantPressError
from quantpress.kernels.layout import PAGE_TOKENS

PAGES = 2
"""Recent pages of a request: the block that is being filled, and the one before."""

NULL_BLOCK = 0
"""A block of vLLM's that holds nobody's tokens."""


class RecentTokensLostError(QuantPressError, RuntimeError):
    """Tokens that are in no packed block yet have lost their recent page."""


@dataclass(frozen=True)
class Capacity:
    """Sizes of the pools.

    Args:
        requests: most requests at a time.
        entries: sink entries.
    """

    requests: int
    entries: int

    @property
    def pages(self) -> int:
        """Recent pages; the last `PAGES` belong to no request."""
        return PAGES * (self.requests + 1)


class BlockState:
    """The pairs of blocks with recent pages, and of first blocks with sink entries.

    Args:
        blocks: blocks of vLLM's cache.
        capacity: sizes of the pools.
        device: of all tensors.

    Attributes:
        page_of: [blocks + 1] int32, recent page of a block, or -1; the last element is nobody's.
        block_of: [pages + 1] int32, block of a recent page, or -1.
        entry_of: [blocks + 1] int32, sink entry of a first block, or -1.
        first_of: [entries + 1] int32, first block of a sink entry, or -1.
        used: [entries + 1] int32, the last step in which a request read the entry.
    """

    def __init__(self, blocks: int, capacity: Capacity, device: torch.device) -> None:
        def empty(size: int) -> Tensor:
            return torch.full((size + 1,), -1, dtype=torch.int32, device=device)

        self.blocks, self.capacity, self.device = blocks, capacity, device
        self.page_of, self.block_of = empty(blocks), empty(capacity.pages)
        self.entry_of, self.first_of, self.used = empty(blocks), empty(capacity.entries), empty(capacity.entries)
        self.step = 0
        self._pages_used = torch.full((capacity.pages,), -1, dtype=torch.int64)  # without slots
        self._filled = torch.full((capacity.pages,), PAGE_TOKENS, dtype=torch.int64)

    def pages(self, blocks: Tensor) -> Tensor:
        """Recent pages of blocks, any shape int64; -1 for those that have none."""
        return _paired(self.page_of, self.block_of, blocks)

    def entries(self, blocks: Tensor) -> Tensor:
        """Sink entries of first blocks, any shape int64; -1 for those that have none."""
        return _paired(self.entry_of, self.first_of, blocks)

    def begin(self, blocks: Tensor, pages: Tensor, begun: Tensor) -> None:
        """Give blocks [n] int64 the pages [n] int64, where `begun` [n]."""
        nobody = torch.full_like(blocks, -1)
        self.page_of[blocks.where(begun, nobody)] = pages.to(torch.int32)
        self.block_of[pages.where(begun, nobody)] = blocks.to(torch.int32)

    def end(self, blocks: Tensor) -> None:
        """Blocks [n] int64 are written anew; they have no page."""
        self.page_of[blocks] = -1

    def new_entries(self, blocks: Tensor, reading: Tensor) -> None:
        """Give first blocks [n] int64 the sink entries that were read longest ago.

        Args:
            blocks: first blocks whose first token is written in this step.
            reading: [m] int64, first blocks of all requests of this step.
        """
        self.step += 1
        entries = self.entries(reading)
        self.used[entries] = self.step  # -1 is nobody's element
        if not len(blocks):
            return
        real = blocks != NULL_BLOCK
        chosen = self.used[:-1].topk(len(blocks), largest=False).indices.where(real, -1)
        self.entry_of[blocks.where(real, -1)] = chosen.to(torch.int32)
        self.first_of[chosen] = blocks.to(torch.int32)
        self.used[chosen] = self.step

    def hold(self, pages: Iterable[Tensor]) -> None:
        """Without slots: let no other request take these pages [1] int64 in this step."""
        for page in pages:
            self._pages_used[page[page >= 0]] = self.step

    def take_pages(self, rows: list[tuple[int, int, int, int]]) -> list[int]:
        """Pages of the newest blocks of requests, without slots; only on a CPU.

        Args:
            rows: for each block its number, its first position, and the request's tokens before and after
                this step.

        Returns:
            The page of each block that this step writes to, and -1 for others.

        Raises:
            RecentTokensLostError: a block goes on whose page was taken.
        """
        found = self.pages(torch.tensor([row[0] for row in rows], dtype=torch.int64)).tolist()
        self._pages_used[[page for page in found if page >= 0]] = self.step
        for i, (block, first, before, after) in enumerate(rows):
            if after <= max(first, before) or before >= first + PAGE_TOKENS:
                continue  # not written to
            if before <= first:
                found[i] = self._oldest_page()
                self.begin(*(torch.tensor([n]) for n in (block, found[i])), torch.tensor([True]))
            elif found[i] < 0:
                raise RecentTokensLostError(
                    f"{before - first} tokens of block {block} are in no packed block, and their page was taken by "
                    "another request; raise max_num_seqs"
                )
            self._filled[found[i]] = min(after - first, PAGE_TOKENS)
            self._pages_used[found[i]] = self.step
        return found

    def _oldest_page(self) -> int:
        """The page used longest ago, among those of full blocks if there is one that this step does not use."""
        age = self._pages_used + (self._filled < PAGE_TOKENS) * (1 << 40)
        age[self._pages_used == self.step] += 1 << 50
        return int(age.argmin())


def _paired(one: Tensor, other: Tensor, index: Tensor) -> Tensor:
    found = one[index].long()
    return found.where((found >= 0) & (other[found] == index), -1)
