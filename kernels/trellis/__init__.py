"""Codes of trellis codes: `nearest_path`, which chooses between the kernel and plain PyTorch.

reference.py        plain PyTorch: `quantpress.quantization.trellis.path`
bit_planes.py       pages of single bits, in which codes are stored
triton_kernel.py    Viterbi's algorithm, a vector in half a warp or a whole one
triton_search.py    launches it: which vectors it takes, its settings and its workspace
"""

from torch import Tensor

from quantpress.kernels.available import runs_triton
from quantpress.kernels.trellis.reference import nearest_path_reference
from quantpress.quantization.trellis import Trellis

__all__ = ["nearest_path"]


def nearest_path(unit: Tensor, trellis: Trellis) -> Tensor:
    """Codes of the tail-biting path that is nearest, or nearly so, to each vector.

    Args:
        unit: [N, D] float32, unit vectors; D is at least 8.
        trellis: the trellis.

    Returns:
        [N, D] uint8, each below 2**bits. The kernel and plain PyTorch find the same ones.
    """
    if runs_triton(unit.device):
        from quantpress.kernels.trellis.triton_search import nearest_path_triton, supports_search

        if supports_search(unit):
            return nearest_path_triton(unit, trellis)
    return nearest_path_reference(unit, trellis)
