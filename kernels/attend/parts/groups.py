"""Which codes in parts the int8 kernel reads: two groups of 64 channels, and keys of 128 with a sketch."""

from dataclasses import replace

import torch

from quantpress.kept import kept
from quantpress.kernels.attend.operands import (
    CodePart,
    KernelOperands,
    PackedSegment,
    PackedSide,
    PartOperands,
    ScalarOperands,
)
from quantpress.quantization.rotation import Rotation

HEAD_DIM = 128
WIDTHS = (2, 3, 4)
"""Of first groups; second ones may have 1 bit, too, and so may codes beside a sketch."""

BESIDE = 128.0
"""That of `split_mma`, which is not loaded here."""

ROWS = 8
"""Rows of a block: more would not fit into registers."""

Groups = tuple[ScalarOperands, ...]


def groups_of(operands: KernelOperands | None) -> Groups:
    """The channel groups of operands, one or two; none where these are codes of another kind."""
    if isinstance(operands, PartOperands):
        return operands.groups
    return (operands,) if isinstance(operands, ScalarOperands) else ()


def sketch_of(operands: KernelOperands | None) -> CodePart | None:
    """The sketch beside one group."""
    beside = isinstance(operands, PartOperands) and len(operands.parts) > len(operands.groups) == 1
    return operands.parts[1] if beside and isinstance(operands, PartOperands) else None


def second_part(operands: KernelOperands) -> CodePart | None:
    """The second group, or the sketch."""
    return operands.parts[1] if isinstance(operands, PartOperands) else None


def readable_groups(query: torch.Tensor, pages: PackedSegment) -> bool:
    """Whether the int8 kernel reads these pages in parts: keys, values or both in two groups, or a sketch.

    Their levels are whole numbers, rotations of groups and of values are Walsh-Hadamard matrices with signs,
    and queries have 16 bits.
    """
    sides = pages.keys, pages.values
    found = [side.codec.kernel_operands() for side in sides]
    shift = pages.values.transform.mean is not None or pages.values.transform.weight is not None
    if query.dtype not in (torch.bfloat16, torch.float16) or shift or sketch_of(found[1]) is not None:
        return False
    return all(map(_fits, sides, found)) and any(isinstance(operands, PartOperands) for operands in found)


def _fits(side: PackedSide, operands: KernelOperands | None) -> bool:
    groups, sketch = groups_of(operands), sketch_of(operands)
    if any(group.fine or group.page_keys for group in groups):
        return False
    turned = all(group.rotation.kind == "hadamard" for group in groups)
    even = [group.head_dim for group in groups] in ([HEAD_DIM], [HEAD_DIM // 2] * 2)
    widths = [group.bits for group in groups]
    ordered = (side.transform.order is not None) == (len(groups) == 2)
    least = 1 if sketch is not None else 2
    fits = even and ordered and least <= widths[0] <= max(WIDTHS) and max(widths) <= max(WIDTHS)
    return fits and (turned or sketch is not None)


def steps_of_groups(rows: int, paged: bool) -> int:
    """Steps in which a page is read: two where a whole page would not fit into registers.

    Args:
        rows: rows that a program computes.
        paged: whether heads have page tables, which need registers too.
    """
    return 1 if rows <= 4 and not paged else 2


def signs_of_groups(groups: Groups, device: torch.device, keys: bool) -> torch.Tensor:
    """[D] float32: the first rows of the groups' rotations one after the other, times the units of levels."""
    beside = keys and groups[0].bits > 1
    units = tuple(group.unit * _unit_of_plane(group.bits, group.levels, beside) for group in groups)
    return _signs(tuple(group.rotation for group in groups), units, device)


@kept
def _signs(rotations: tuple[Rotation, ...], units: tuple[float, ...], device: torch.device) -> torch.Tensor:
    rows = [rotation.matrix()[0] * unit for rotation, unit in zip(rotations, units, strict=True)]
    return torch.cat(rows).float().to(device)


def _unit_of_plane(bits: int, levels: tuple[float, ...], beside: bool) -> float:
    """What the kernel reads as 1 where codes are a bit plane; beside: of keys, beside wider codes."""
    return levels[-1] / (BESIDE if beside else 1.0) if bits == 1 else 1.0


@kept
def with_planes(operands: PartOperands, keys: bool) -> PartOperands:
    """Keys or values with levels 1 and -1 in parts of one bit, as the kernel reads them."""
    parts, rows, beside = [], [], keys and operands.parts[0].bits > 1
    turns = operands.turn.split([part.channels for part in operands.parts])
    for part, turn in zip(operands.parts, turns, strict=True):
        rows.append(turn * _unit_of_plane(part.bits, part.levels, beside))
        parts.append(replace(part, levels=(-1.0, 1.0)) if part.bits == 1 else part)
    return PartOperands(tuple(parts), torch.cat(rows), operands.groups)


@kept
def lookup_of_groups(keys: Groups, values: Groups, device: torch.device) -> torch.Tensor:
    """[8, 32] int32: `lookup_table` of the first groups, and of the second ones where there are such."""
    from quantpress.kernels.attend.lookup import lookup_table

    tables = []
    for number in range(2):
        groups = [side[number] if number < len(side) else None for side in (keys, values)]
        books = [None if one is None or one.bits == 1 else one.codebook for one in groups]
        tables.append(lookup_table(books[0], books[1], torch.device("cpu")))
    return torch.cat(tables).to(device)  # no kernel makes it: others read it before they wait for any
