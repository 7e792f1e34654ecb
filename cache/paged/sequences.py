"""The sequences of paged attention: the blocks and the length of each, on the host and on the device."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from quantpress.cache.paged.block_allocator import BlockAllocator
from quantpress.cache.paged.pool import PagePool
from quantpress.cache.paged.storage import Packing
from quantpress.errors import InvalidInputError, PoolFullError
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass
class _Sequence:
    """A sequence as the host knows it: its length, and the block of each of its pages."""

    tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class PagedSequences:
    """Opens, extends, forks and frees sequences in a page pool.

    Attributes are those of `quantpress.cache.PagedAttention`.

    Args:
        pool: the memory.
        max_tokens: most tokens of one sequence; None: limited by the blocks only.
    """

    def __init__(self, pool: PagePool, max_tokens: int | None) -> None:
        self.pool, self.max_tokens = pool, max_tokens
        count, pages = pool.size.sequences, pool.size.blocks
        if max_tokens is not None:
            pages = min(pages, max(1, pool.pages_of(max_tokens)))
        self._blocks = BlockAllocator(pool.size.blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._free = deque(range(count))
        with torch.inference_mode(False):  # so that any mode may write to it later
            self.block_tables = torch.zeros(count, pages, dtype=torch.int32, device=pool.device)
            self.context_lens = torch.zeros(count, dtype=torch.int32, device=pool.device)
            self.page_counts = torch.zeros_like(self.context_lens)

    @property
    def device(self) -> torch.device:
        """The device of the pool."""
        return self.pool.device

    @property
    def sequences(self) -> list[int]:
        """All open sequences, in ascending order."""
        return sorted(self._sequences)

    @property
    def free_blocks(self) -> int:
        """Number of blocks that no sequence holds."""
        return self._blocks.free

    @property
    def step_tokens(self) -> int:
        """Most new tokens of one `extend`: recent_tokens + 1."""
        return self.pool.settings.recent_tokens + 1

    def length(self, sequence: int) -> int:
        """Number of tokens of a sequence."""
        return self._of(sequence).tokens

    def blocks(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self._of(sequence).blocks)

    def blocks_for(self, tokens: int) -> int:
        """Number of blocks that a sequence of `tokens` tokens holds."""
        return self.pool.pages_of(tokens)

    def decode(self, sequence: int, *, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token of a sequence, decoded: keys [Hkv, T, D] and values [Hkv, T, Dv]."""
        of = self._of(sequence)
        return self.pool.decode(sequence, of.blocks, of.tokens, layer=layer)

    def open(self, tokens: int) -> int:
        """Open a sequence with blocks for a prompt, which `fill` then writes layer by layer.

        Args:
            tokens: T of the prompt, 0 or more.

        Returns:
            The number of the sequence.

        Raises:
            PoolFullError: too few blocks are free, or `max_sequences` sequences are open.
            InvalidInputError: `tokens` is negative or larger than `max_tokens`.
        """
        self._check_length(tokens)
        if not self._free:
            raise PoolFullError(
                f"there are {len(self._sequences)} sequences, and no more fit; free one, or raise "
                "max_sequences"
            )
        blocks = self._blocks.take(self.pool.pages_of(tokens))
        sequence = self._free.popleft()
        self._sequences[sequence] = _Sequence(tokens, blocks)
        self._upload([sequence], [sequence])
        return sequence

    def fork(self, sequence: int) -> int:
        """Copy a sequence. Both share all present pages; 16-bit tokens are copied.

        Returns:
            The number of the copy.

        Raises:
            PoolFullError: `max_sequences` sequences are open.
            InvalidInputError: there is no such sequence.
        """
        of = self._of(sequence)
        copy = self.open(0)
        self._blocks.share(of.blocks)
        self._sequences[copy] = _Sequence(of.tokens, list(of.blocks))
        self.pool.copy(sequence, copy)
        self._upload([copy], [copy])
        return copy

    def free(self, sequence: int) -> None:
        """Free a sequence. Blocks that it shares with no other sequence become free."""
        of = self._of(sequence)
        self._blocks.release(of.blocks)
        self._sequences[sequence] = _Sequence()
        self._upload([sequence], [])
        del self._sequences[sequence]
        self.pool.forget(sequence)
        self._free.append(sequence)

    def crop(self, sequence: int, tokens: int) -> None:
        """Keep the first `tokens` tokens of a sequence. Packed tokens cannot be dropped.

        Raises:
            InvalidInputError: `tokens` is larger than the length, or smaller than the number of tokens that
                are sinks or packed.
        """
        of = self._of(sequence)
        least = of.tokens - self._in_window(of)
        if not least <= tokens <= of.tokens:
            raise InvalidInputError(
                f"cannot keep {tokens} of the {of.tokens} tokens of sequence {sequence}: the first {least} "
                "are packed in whole pages and stay"
            )
        of.tokens = tokens
        self._upload([sequence], [])

    def extend(self, sequences: Sequence[int] | None = None, tokens: int = 1) -> None:
        """Count the next tokens of sequences, which `write` then writes layer by layer.

        Windows that would overflow are packed first, in all layers. This is the host's part of a step: call
        it before a captured graph, not inside.

        Args:
            sequences: the sequences, each once; None: all of them.
            tokens: new tokens of each, at most `step_tokens`.

        Raises:
            PoolFullError: too few blocks are free; nothing was changed.
            NonFiniteError: tokens to be packed contain NaN or infinity; nothing was changed.
            InvalidInputError: a sequence is unknown, named twice or would become too long, or `tokens` is out
                of range; nothing was changed.
        """
        if not 1 <= tokens <= self.step_tokens:
            raise InvalidInputError(
                f"a step brings 1 to {self.step_tokens} new tokens, got {tokens}; use append, or more "
                "recent_tokens"
            )
        chosen = self._pages_needed(self.sequences if sequences is None else sequences, tokens)
        packings = [
            Packing(number, self._blocks.take(pages), self._in_window(of), not of.blocks)
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
            self._sequences[packing.sequence].blocks.extend(packing.blocks)
        for of, _ in chosen.values():
            of.tokens += tokens
        self._upload(list(chosen), [packing.sequence for packing in packings])

    def _pages_needed(self, sequences: Sequence[int], tokens: int) -> dict[int, tuple[_Sequence, int]]:
        """The sequences by number, and how many more pages each needs for `tokens` more tokens.

        Raises:
            PoolFullError: too few blocks are free.
            InvalidInputError: a sequence is unknown, named twice or would become too long.
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

    def _in_window(self, of: _Sequence) -> int:
        """Tokens in the window."""
        front = self.pool.settings.sink_tokens if of.blocks else 0
        return of.tokens - front - len(of.blocks) * PAGE_TOKENS

    def _check_length(self, tokens: int) -> None:
        if tokens < 0 or (self.max_tokens is not None and tokens > self.max_tokens):
            most = "any number" if self.max_tokens is None else f"at most {self.max_tokens} (max_tokens)"
            raise InvalidInputError(f"a sequence cannot have {tokens} tokens; it may have 0 or more, {most}")

    @torch.no_grad()
    def _upload(self, sequences: Sequence[int], moved: Sequence[int]) -> None:
        """Update the counts of `sequences` on the device, and the block tables of those that `moved`."""
        if not sequences:
            return
        known = [(number, self._sequences[number]) for number in sequences]
        listed = [[number, of.tokens, len(of.blocks)] for number, of in known]
        counts = torch.tensor(listed, dtype=torch.int64, device="cpu")
        rows, tokens, pages = counts.T.contiguous().to(self.pool.device, non_blocking=True)
        self.context_lens[rows] = tokens.int()
        self.page_counts[rows] = pages.int()
        for number in moved:
            blocks = self._sequences[number].blocks
            self.block_tables[number, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device="cpu")
