"""Which blocks of a page pool are free, and how many sequences share each block."""

from collections import deque
from collections.abc import Sequence

from quantpress.errors import PoolFullError


class BlockAllocator:
    """Allocates the blocks 0 to `blocks` - 1 and counts how many sequences hold each.

    Args:
        blocks: number of blocks.

    Example:
        >>> allocator = BlockAllocator(4)
        >>> held = allocator.take(3)
        >>> allocator.share(held[:1])
        >>> allocator.release(held)
        >>> allocator.free, allocator.holders(held[0])
        (3, 1)
    """

    def __init__(self, blocks: int) -> None:
        self._free = deque(range(blocks))
        self._holders = [0] * blocks

    @property
    def free(self) -> int:
        """Number of free blocks."""
        return len(self._free)

    def holders(self, block: int) -> int:
        """Number of sequences that hold a block."""
        return self._holders[block]

    def check(self, count: int) -> None:
        """Check that `count` blocks are free.

        Raises:
            PoolFullError: fewer blocks are free.
        """
        if count > self.free:
            raise PoolFullError(
                f"{count} more blocks are needed, and {self.free} of {len(self._holders)} are free; "
                "free a sequence, or make the pool with more blocks"
            )

    def take(self, count: int) -> list[int]:
        """Allocate `count` blocks, each held by one sequence.

        Raises:
            PoolFullError: fewer blocks are free; none was allocated.
        """
        self.check(count)
        taken = [self._free.popleft() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Count one more sequence that holds these blocks."""
        for block in blocks:
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Count one sequence fewer that holds these blocks. Blocks that no sequence holds become free."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
