"""Launches the kernel that searches trellis codes: which vectors it takes, its settings and its workspace."""

from typing import Any

import torch
import triton
from torch import Tensor

from quantpress.kernels.available import ROUNDED
from quantpress.kernels.trellis.triton_kernel import LANES, search_kernel
from quantpress.quantization.trellis import Trellis
from quantpress.quantization.trellis.code import shared_levels

WARPS = 1
VECTORS = 4
"""Vectors that a program searches at a time, two in each half of its warp."""
REGISTERS = 128
PROGRAMS = 16
"""Programs of a multiprocessor: as many as its registers hold."""
CHANNELS = 8
"""The head dimension is a multiple of it: halves of a vector are whole words of codes."""


def supports_search(unit: Tensor) -> bool:
    """Whether the kernel takes these vectors: float32 [N, D], N at least 1 and D a multiple of 8."""
    return unit.dtype == torch.float32 and len(unit) > 0 and unit.shape[-1] % CHANNELS == 0


@torch.no_grad()
def nearest_path_triton(unit: Tensor, trellis: Trellis) -> Tensor:
    """As `quantpress.kernels.trellis.nearest_path`, for vectors that `supports_search` takes.

    The workspace is 64 * D bytes for each of up to 16 programs a multiprocessor: 17 MB on an H200 at D = 128,
    for any number of vectors.
    """
    properties: Any = torch.cuda.get_device_properties(unit.device)
    programs = min(triton.cdiv(len(unit), VECTORS), properties.multi_processor_count * PROGRAMS)
    codes, arguments = search_arguments(unit, trellis, programs)
    with torch.cuda.device(unit.device):
        search_kernel[(programs,)](**arguments, num_warps=WARPS, maxnreg=REGISTERS, **ROUNDED)
    return codes


def search_arguments(unit: Tensor, trellis: Trellis, programs: int) -> tuple[Tensor, dict[str, Any]]:
    """The codes [N, D] uint8, which the kernel writes, and its arguments by name."""
    vectors, dim = unit.shape
    codes = unit.new_empty(vectors, dim, dtype=torch.uint8)
    kept = unit.new_empty(programs * (dim // 4) * VECTORS * LANES.value, dtype=torch.int32)
    arguments = {
        "unit_ptr": unit.contiguous(),
        "levels_ptr": shared_levels(trellis, 1, unit.device),
        "kept_ptr": kept,
        "codes_ptr": codes.view(torch.int32),
        "vectors": vectors,
        "factor": dim**0.5,
        "D": dim,
        "V": VECTORS,
        "BITS": trellis.bits,
    }
    return codes, arguments
