"""Walsh-Hadamard transforms of vectors in registers (Triton): no matrix is read."""

import triton
import triton.language as tl


@triton.jit
def _signs(N: tl.constexpr):
    """The Walsh-Hadamard matrix in Sylvester's order, [N, N] float32 of -1 and 1, N at most 16."""
    index = tl.arange(0, N)
    common = index[:, None] & index[None, :]
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(tl.float32)


@triton.jit
def hadamard(x, D: tl.constexpr):
    """H x for x [D] float32, D a power of two from 32 to 256, and H [D, D] of -1 and 1 in Sylvester's order.

    H is the Kronecker product of two matrices of at most 16 rows, so that it takes two short sums.
    """
    ROWS: tl.constexpr = 16
    COLUMNS: tl.constexpr = D // ROWS
    x = x.reshape([ROWS, COLUMNS])
    x = tl.sum(_signs(ROWS)[:, :, None] * x[None, :, :], 1)
    x = tl.sum(x[:, :, None] * _signs(COLUMNS)[None, :, :], 1)
    return x.reshape([D])
