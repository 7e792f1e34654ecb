"""Which sequence of paged attention has which blocks, and how many tokens: host and device alike."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from quantpress.cache.paged.block_allocator import BlockAllocator
from quantpress.cache.paged.page_pool import PagePool
from quantpress.cache.paged.pool_pages import Packing
from quantpress.errors import InvalidInputError, PoolFullError
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass
class _Sequence:
    """What the host knows of a sequence: its tokens, and the block of each of its pages."""

    tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedSequences:
    """Sequences that come, grow, fork and go in a page pool.

    Args:
        pool: the memory.
        max_tokens: most tokens of one sequence; None: one may take all blocks.

    Attributes: as in `quantpress.cache.PagedAttention`.
    """

    def __init__(self, pool: PagePool, max_tokens: int | None) -> None:
        self.pool, self.max_tokens = pool, max_tokens
        slots, pages = pool.size.slots, pool.size.blocks
        if max_tokens is not None:
            pages = min(pages, max(1, pool.pages_of(max_tokens)))
        self._blocks = BlockAllocator(pool.size.blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._slots = deque(range(slots))
        with torch.inference_mode(False):  # so that any mode may write to it later
            self.block_tables = torch.zeros(slots, pages, dtype=torch.int32, device=pool.device)
            self.context_lens = torch.zeros(slots, dtype=torch.int32, device=pool.device)
            self.page_counts = torch.zeros_like(self.context_lens)

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.pool.device

    @property
    def sequences(self) -> list[int]:
        """The sequences there are."""
        return sorted(self._sequences)

    @property
    def free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return self._blocks.free

    @property
    def step_tokens(self) -> int:
        """Most new tokens of one `extend`: recent_tokens + 1."""
        return self.pool.settings.recent_tokens + 1

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._of(sequence).tokens

    def blocks(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self._of(sequence).blocks)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds."""
        return self.pool.pages_of(tokens)

    def decode(self, sequence: int, *, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token of a sequence, decoded: keys [Hkv, T, D] and values [Hkv, T, Dv]."""
        of = self._of(sequence)
        return self.pool.decode(sequence, of.blocks, of.tokens, layer=layer)

    def open(self, tokens: int) -> int:
        """A new sequence with blocks for a prompt, which `fill` brings in layer by layer.

        Args:
            tokens: T of the prompt, 0 or more.

        Raises:
            PoolFullError: too few free blocks, or there are `max_sequences` sequences already.
            InvalidInputError: more than `max_tokens`.
        """
        self._check_length(tokens)
        if not self._slots:
            raise PoolFullError(
                f"there are {len(self._sequences)} sequences, and no more fit; free one, or raise "
                "max_sequences"
            )
        blocks = self._blocks.take(self.pool.pages_of(tokens))
        slot = self._slots.popleft()
        self._sequences[slot] = _Sequence(tokens, blocks)
        self._tell([slot], [slot])
        return slot

    def fork(self, sequence: int) -> int:
        """A copy of a sequence. They share every page there is; 16-bit tokens are copied.

        Returns:
            Its number.

        Raises:
            PoolFullError: there are `max_sequences` sequences already.
        """
        of = self._of(sequence)
        copy = self.open(0)
        self._blocks.share(of.blocks)
        self._sequences[copy] = _Sequence(of.tokens, list(of.blocks))
        self.pool.copy(sequence, copy)
        self._tell([copy], [copy])
        return copy

    def free(self, sequence: int) -> None:
        """Forget a sequence; blocks that no other one shares are free again."""
        of = self._of(sequence)
        self._blocks.release(of.blocks)
        self._sequences[sequence] = _Sequence()
        self._tell([sequence], [])
        del self._sequences[sequence]
        self.pool.forget(sequence)
        self._slots.append(sequence)

    def crop(self, sequence: int, tokens: int) -> None:
        """Keep the first `tokens` of a sequence; only tokens that are not packed yet can be dropped.

        Raises:
            InvalidInputError: more are to be dropped.
        """
        of = self._of(sequence)
        least = of.tokens - self._waiting(of)
        if not least <= tokens <= of.tokens:
            raise InvalidInputError(
                f"cannot keep {tokens} of the {of.tokens} tokens of sequence {sequence}: the first {least} "
                "are packed in whole pages and stay"
            )
        of.tokens = tokens
        self._tell([sequence], [])

    def extend(self, sequences: Sequence[int] | None = None, tokens: int = 1) -> None:
        """Make room for the next tokens of sequences, which `write` brings in layer by layer.

        Tokens that have waited long enough are packed first, in all layers. This is the host's part of a
        step: it belongs in front of a captured graph, not inside.

        Args:
            sequences: which, each once; None: all of them.
            tokens: new tokens of each, at most `step_tokens`.

        Raises:
            PoolFullError: too few free blocks; nothing was changed.
            NonFiniteError: tokens that are to be packed hold NaN or infinity; nothing was changed.
            InvalidInputError: an unknown sequence or one twice, too many tokens.
        """
        if not 1 <= tokens <= self.step_tokens:
            raise InvalidInputError(
                f"a step brings 1 to {self.step_tokens} new tokens, got {tokens}; use append, or more "
                "recent_tokens"
            )
        chosen = self._room(self.sequences if sequences is None else sequences, tokens)
        packings = [
            Packing(number, self._blocks.take(pages), self._waiting(of), not of.blocks)
            for number, (of, pages) in chosen.items()
            if pages
        ]
        try:
            self.pool.pack(packings)
        except BaseException:
            for packing in packings:
                self._blocks.release(packing.blocks)
            raise
        for packing in packings:
            self._sequences[packing.slot].blocks.extend(packing.blocks)
        for of, _ in chosen.values():
            of.tokens += tokens
        self._tell(list(chosen), [packing.slot for packing in packings])

    def _room(self, sequences: Sequence[int], tokens: int) -> dict[int, tuple[_Sequence, int]]:
        """The sequences by number, and how many pages more each has with `tokens` more tokens.

        Raises:
            PoolFullError: not so many blocks are free.
            InvalidInputError: an unknown sequence or one twice, or one that would be too long.
        """
        if len(set(sequences)) < len(sequences):
            raise InvalidInputError(f"a sequence is named twice: {list(sequences)}; name each once")
        chosen = {}
        for number in sequences:
            of = self._of(number)
            self._check_length(of.tokens + tokens)
            chosen[number] = of, max(0, self.pool.pages_of(of.tokens + tokens) - len(of.blocks))
        self._blocks.check(sum(pages for _, pages in chosen.values()))
        return chosen

    def _of(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise InvalidInputError(
                f"there is no sequence {sequence!r}; there are {self.sequences}, and add makes more"
            )
        return self._sequences[sequence]

    def _waiting(self, of: _Sequence) -> int:
        """Tokens in the window."""
        front = self.pool.settings.sink_tokens if of.blocks else 0
        return of.tokens - front - len(of.blocks) * PAGE_TOKENS

    def _check_length(self, tokens: int) -> None:
        if tokens < 0 or (self.max_tokens is not None and tokens > self.max_tokens):
            most = "any number" if self.max_tokens is None else f"at most {self.max_tokens} (max_tokens)"
            raise InvalidInputError(f"a sequence cannot have {tokens} tokens; it may have 0 or more, {most}")

    @torch.no_grad()
    def _tell(self, sequences: Sequence[int], moved: Sequence[int]) -> None:
        """Bring the device's counts up to date, and the block tables of those `moved`."""
        if not sequences:
            return
        known = [(number, self._sequences[number]) for number in sequences]
        listed = [[number, of.tokens, len(of.blocks)] for number, of in known]
        counts = torch.tensor(listed, dtype=torch.int64, device="cpu")
        slots, tokens, pages = counts.T.contiguous().to(self.pool.device, non_blocking=True)
        self.context_lens[slots] = tokens.int()
        self.page_counts[slots] = pages.int()
        for number in moved:
            blocks = self._sequences[number].blocks
            self.block_tables[number, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device="cpu")
