"""Which blocks have copies of their tokens in 16 bits, and where.

The newest tokens of a request lie in *recent pages* of 128 tokens, the first tokens of a prompt in *sink
entries*, both in pools beside vLLM's cache. vLLM shares and recycles blocks and tells nobody, so every copy
is found from its block: `page_of[block]` names a page, and counts only while `block_of[page]` names the block
again. Whoever writes to a block from its first token on, or takes a page for another block, thereby ends the
old pair.

With slots (vLLM's rows of running requests) a request has two pages of its own, used in turn. Without, on a
CPU, a page is taken from whoever has not used one for longest.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.errors import QuantPressError
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.steps import BlockMaps, StepRequests
from quantpress.kernels.steps.operands import NEWEST, NULL_BLOCK
from quantpress.kernels.steps.reference import newest_blocks


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
        """Recent pages; the last two belong to no request."""
        return NEWEST * (self.requests + 1)


class BlockState:
    """The pairs of blocks with recent pages, and of first blocks with sink entries.

    Args:
        blocks: blocks of vLLM's cache.
        capacity: sizes of the pools.
        sinks: tokens of a sink entry.
        device: of all tensors.

    Attributes:
        maps: the pairs.
        step: counts the steps.
    """

    def __init__(self, blocks: int, capacity: Capacity, sinks: int, device: torch.device) -> None:
        def empty(size: int) -> Tensor:
            return torch.full((size + 1,), -1, dtype=torch.int32, device=device)

        entries = capacity.entries
        self.maps = BlockMaps(
            empty(blocks), empty(capacity.pages), empty(blocks), empty(entries), empty(entries), sinks
        )
        self.capacity, self.device, self.step = capacity, device, 0
        self._pages_used = torch.full((capacity.pages,), -1, dtype=torch.int64)  # without slots
        self._filled = torch.full((capacity.pages,), PAGE_TOKENS, dtype=torch.int64)

    def end(self, blocks: Tensor) -> None:
        """Blocks [n] int64 are written anew; they have no page."""
        self.maps.page_of[blocks] = -1

    def new_entries(self, blocks: Tensor, reading: Tensor) -> None:
        """Give first blocks the sink entries that were read longest ago.

        Args:
            blocks: [n] int64, first blocks whose first token is written in this step.
            reading: [m] int64, first blocks of all requests of this step.
        """
        maps = self.maps
        maps.used[maps.entries(reading)] = self.step  # -1 is nobody's element
        real = blocks != NULL_BLOCK
        chosen = maps.used[:-1].topk(len(blocks), largest=False).indices.where(real, -1)
        maps.entry_of[blocks.where(real, -1)] = chosen.to(torch.int32)
        maps.first_of[chosen] = blocks.to(torch.int32)
        maps.used[chosen] = self.step

    def hold(self, pages: Iterable[Tensor]) -> None:
        """Without slots: let no other request take these pages [1] int64 in this step."""
        for page in pages:
            self._pages_used[page[page >= 0]] = self.step

    def take_pages(self, requests: StepRequests) -> Tensor:
        """Pages of the newest blocks of requests without slots, as `begin_blocks` gives them; only on a CPU.

        Raises:
            RecentTokensLostError: a block goes on whose page was taken.
        """
        blocks, firsts, written = newest_blocks(requests)
        pages = self.maps.pages(blocks)
        self._pages_used[pages[pages >= 0]] = self.step
        before = (requests.lengths - requests.starts.diff()).tolist()
        for row, column in written.nonzero().tolist():
            first, block, page = (int(x[row, column]) for x in (firsts, blocks, pages))
            if first >= before[row]:
                page = self._oldest_page()
                self.maps.begin(torch.tensor([block]), torch.tensor([page]), torch.tensor([True]))
            elif page < 0:
                raise RecentTokensLostError(
                    f"{before[row] - first} tokens of block {block} are not packed yet, and another request "
                    "has taken their page; raise max_num_seqs"
                )
            self._filled[page] = min(int(requests.lengths[row]) - first, PAGE_TOKENS)
            self._pages_used[page] = self.step
            pages[row, column] = page
        return pages.where(written, -1)

    def _oldest_page(self) -> int:
        """The page used longest ago; one of a full block, if there is one that this step does not use."""
        age = self._pages_used + (self._filled < PAGE_TOKENS) * (1 << 40)
        age[self._pages_used == self.step] += 1 << 50
        return int(age.argmin())
