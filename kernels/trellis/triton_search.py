"""Launches the kernel that searches trellis codes: which vectors it takes, its settings and its workspace."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from quantpress.kernels.available import ROUNDED
from quantpress.kernels.trellis.triton_kernel import search_kernel
from quantpress.quantization.trellis import Trellis
from quantpress.quantization.trellis.code import shared_levels
from quantpress.quantization.trellis.path import JOIN

WARPS = 1
CHANNELS = 8
"""The head dimension is a multiple of it, so that half of a vector is whole words of codes."""


@dataclass(frozen=True)
class SearchSettings:
    """How the kernel is launched.

    Args:
        vectors: vectors that a program searches at a time, two in each register; a power of two from 2 to 32.
            Half as many where a vector takes a whole warp.
        programs: most programs of a multiprocessor.
        registers: most registers per thread; 65536 / 32 of them are for all programs of a multiprocessor.
    """

    vectors: int = 4
    programs: int = 16
    registers: int = 128


SETTINGS = SearchSettings()


def supports_search(unit: Tensor) -> bool:
    """Whether the kernel takes these vectors: float32 [N, D], N at least 1 and D a multiple of 8."""
    return unit.dtype == torch.float32 and len(unit) > 0 and unit.shape[-1] % CHANNELS == 0


@torch.no_grad()
def nearest_path_triton(unit: Tensor, trellis: Trellis, settings: SearchSettings = SETTINGS) -> Tensor:
    """As `quantpress.kernels.trellis.nearest_path`, for vectors that `supports_search` takes.

    The workspace is 16 * D bytes for each vector that is searched at the same time: 17 MB on an H200 at
    D = 128, for any number of vectors.
    """
    properties: Any = torch.cuda.get_device_properties(unit.device)
    most = properties.multi_processor_count * settings.programs
    programs = min(triton.cdiv(len(unit), vectors_of_tile(trellis, settings)), most)
    codes, arguments = search_arguments(unit, trellis, programs, settings)
    with torch.cuda.device(unit.device):
        search_kernel[(programs,)](**arguments, num_warps=WARPS, maxnreg=settings.registers, **ROUNDED)
    return codes


def vectors_of_tile(trellis: Trellis, settings: SearchSettings) -> int:
    """Vectors that a program searches at a time."""
    lanes = 1 << (trellis.state_bits - 4)  # of one vector, with 16 states each
    return settings.vectors * 16 // lanes


def search_arguments(
    unit: Tensor, trellis: Trellis, programs: int, settings: SearchSettings = SETTINGS
) -> tuple[Tensor, dict[str, Any]]:
    """The codes [N, D] uint8, which the kernel writes, and its arguments by name."""
    count, dim = unit.shape
    codes = unit.new_empty(count, dim, dtype=torch.uint8)
    kept = unit.new_empty(programs * (dim // 4) * settings.vectors * 16, dtype=torch.int32)
    arguments = {
        "unit_ptr": unit.contiguous(),
        "levels_ptr": shared_levels(trellis, 1, unit.device),
        "kept_ptr": kept,
        "codes_ptr": codes.view(torch.int32),
        "vectors": count,
        "factor": dim**0.5,
        "D": dim,
        "V": vectors_of_tile(trellis, settings),
        "BITS": trellis.bits,
        "WINDOW": trellis.state_bits,
        "JOIN": min(JOIN[trellis.bits], dim // 2),
    }
    return codes, arguments
