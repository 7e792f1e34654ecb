"""The order in which PyTorch's mean over the last dimension adds on a GPU.

A group of threads adds up a row. Each thread has four sums, over every n-th element or every n-th four
elements; then it adds the four. The threads' sums are added in halves: those of the second half to those of
the first half, and so on. Source: aten/src/ATen/native/cuda/Reduce.cuh of PyTorch.
"""

from dataclasses import dataclass

MOST_THREADS = 512
WARP = 32
SUMS = 4  # of one thread
LEAST_VECTORIZED = 128  # elements of a row


@dataclass(frozen=True)
class AddingOrder:
    """How a row of numbers is added up.

    Args:
        width: threads in a line.
        height: lines of threads that share a row; first each line adds up, then the lines.
        vectorized: a thread's four sums are over four neighbours, in place of elements that lie as far apart
            as there are threads.
        neighbours_first: the last 32 sums are added neighbour to neighbour, in place of half to half.
    """

    width: int
    height: int
    vectorized: bool
    neighbours_first: bool


def adding_orders(rows: int, size: int) -> tuple[AddingOrder, ...]:
    """The orders that versions of PyTorch use for a mean of float32 over `size` elements, the newest's first.

    Args:
        rows: how many means, of rows that follow each other without a gap.
        size: elements of a row, a multiple of 4.
    """
    vectorized = (size >= LEAST_VECTORIZED, rows == 1 and size > LEAST_VECTORIZED)
    found = (_order(rows, size, one, first) for first in (False, True) for one in vectorized)
    return tuple(dict.fromkeys(found))


def _order(rows: int, size: int, vectorized: bool, neighbours_first: bool) -> AddingOrder:
    most_width = min(_power_below(size // SUMS if vectorized else size), MOST_THREADS)
    height = min(_power_below(rows), MOST_THREADS // min(most_width, WARP))
    width = min(most_width, MOST_THREADS // height)
    shares = -(-size // width) >= min(height * 16, 256)
    return AddingOrder(width, height if shares else 1, vectorized, neighbours_first)


def _power_below(number: int) -> int:
    """The largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)
