"""Channel groups that the int8 kernel reads: two of 64 channels each, beside each other."""

from functools import lru_cache

import torch

from quantpress.kernels.attend.lookup import lookup_table
from quantpress.kernels.attend.operands import (
    KernelOperands,
    PackedSegment,
    PackedSide,
    PartOperands,
    ScalarOperands,
)
from quantpress.quantization.rotation import Rotation

HEAD_DIM = 128
WIDTHS = (2, 3, 4)
ROWS = 8
"""Rows of a block: more would spill."""

Groups = tuple[ScalarOperands, ...]


def groups_of(operands: KernelOperands | None) -> Groups:
    """The channel groups of operands, one or two; none where these are codes of another kind."""
    if isinstance(operands, PartOperands):
        return operands.groups
    return (operands,) if isinstance(operands, ScalarOperands) else ()


def readable_groups(query: torch.Tensor, pages: PackedSegment) -> bool:
    """Whether the int8 kernel reads these pages as groups: keys, values or both in two groups of 64 channels.

    Their levels are whole numbers, rotations are Walsh-Hadamard matrices with signs, queries in 16 bits.
    """
    sides = [(side, groups_of(side.codec.kernel_operands())) for side in (pages.keys, pages.values)]
    shift = pages.values.transform.mean is not None or pages.values.transform.weight is not None
    small = query.dtype in (torch.bfloat16, torch.float16) and not shift
    return small and all(_fits(*side) for side in sides) and any(len(groups) == 2 for _, groups in sides)


def _fits(side: PackedSide, groups: Groups) -> bool:
    even = [group.head_dim for group in groups] in ([HEAD_DIM], [HEAD_DIM // 2] * 2)
    ordered = (side.transform.order is not None) == (len(groups) == 2)
    return even and ordered and all(_is_plain(group) for group in groups)


def _is_plain(group: ScalarOperands) -> bool:
    plain = group.bits in WIDTHS and not group.fine and not group.page_keys
    return plain and group.rotation.kind == "hadamard"


def steps_of_groups(keys: Groups, values: Groups, rows: int, paged: bool) -> int:
    """Steps in which a page is read, as `triton_attend.steps_of_page` says for one group."""
    return 1 if rows <= 4 and not paged else 2


@lru_cache(maxsize=64)
def signs_of_groups(
    rotations: tuple[Rotation, ...], units: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """[D] float32: the first rows of the groups' rotations one after the other, times the units of levels."""
    with torch.inference_mode(False):  # kept: must stay usable outside inference mode
        rows = [rotation.matrix()[0] * unit for rotation, unit in zip(rotations, units, strict=True)]
        return torch.cat(rows).float().to(device)


@lru_cache(maxsize=64)
def lookup_of_groups(keys: Groups, values: Groups, device: torch.device) -> torch.Tensor:
    """[8, 32] int32: `lookup_table` of the first groups, and of the second ones where there are such."""
    firsts = keys[0].codebook, values[0].codebook
    seconds = [groups[1].codebook if groups[1:] else None for groups in (keys, values)]
    with torch.inference_mode(False):  # kept, as above
        return torch.cat([lookup_table(*firsts, device), lookup_table(*seconds, device)])
