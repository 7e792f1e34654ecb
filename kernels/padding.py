"""How many channels a tile has in Triton kernels; `rotation_matrix.padded` tells the same to launches."""

from triton.runtime.jit import constexpr_function


@constexpr_function
def padded(channels: int) -> int:
    """The next power of two, 16 at least: so many channels a product takes."""
    return max(16, 1 << (channels - 1).bit_length())
