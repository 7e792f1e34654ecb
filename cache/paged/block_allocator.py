"""Which blocks of a page pool are free, and how many sequences share each of the others."""

from collections import deque
from collections.abc import Sequence

from quantpress.errors import PoolFullError


class BlockAllocator:
    """Hands out the blocks 0 to `blocks` - 1 and counts who holds each.

    Args:
        blocks: how many there are.

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
        """Blocks that nobody holds."""
        return len(self._free)

    def holders(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._holders[block]

    def check(self, count: int) -> None:
        """Refuse where fewer than `count` blocks are free.

        Raises:
            PoolFullError: that is so.
        """
        if count > self.free:
            raise PoolFullError(
                f"{count} more blocks are needed, and {self.free} of {len(self._holders)} are free; "
                "free a sequence, or make the pool with more blocks"
            )

    def take(self, count: int) -> list[int]:
        """`count` free blocks, held once from now on.

        Raises:
            PoolFullError: fewer are free; none was taken.
        """
        self.check(count)
        taken = [self._free.popleft() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more sequence holds these blocks."""
        for block in blocks:
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One sequence fewer holds these blocks; those that nobody holds are free again."""
        for block in blocks:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)
