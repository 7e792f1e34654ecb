"""Launches the kernels for codes in parts: their settings and their arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantpress.kernels.attend.operands import CodePart, PackedSegment, PackedSide, PartOperands
from quantpress.kernels.attend.parts.operands import (
    LEAST_CHANNELS,
    MOST_LEVELS,
    level_rows,
    padded_channels,
    turn_matrix,
)
from quantpress.kernels.available import FUSED
from quantpress.kernels.quick import quick
from quantpress.quantization.transform import ChannelTransform

MOST_WARPS = 8
"""Warps of the split kernel for which a multiprocessor has registers, as the assembler gives them out."""

MERGED = 32
"""Partial sums that are joined at a time."""


@dataclass(frozen=True)
class Rows:
    """Rows of queries, as `_Call` of `triton_attend` has them: the fields are its."""

    query: torch.Tensor
    heads: int
    kv_heads: int
    rows: int
    queries: int
    group: int
    block: int
    blocks: int
    slots: torch.Tensor | None


def warps(keys: PartOperands, values: PartOperands) -> int:
    """Warps of a program of the split kernel: as few as hold its sums in registers.

    On an H200, values in two parts took 285, 275 and 465 us with one, two and four warps (131072 tokens, 3.5
    bits), and in one part 179, 274 and 317.
    """
    many = max(keys.head_dim, values.head_dim) > 128
    return (2 if many else 1) * len(values.parts)


def programs(keys: PartOperands, values: PartOperands) -> int:
    """Programs of the split kernel that a multiprocessor runs at a time; more of them would begin late.

    Two channel groups of 128 take 168 registers a thread: twelve warps.
    """
    own = warps(keys, values)
    spared = own == 2 and max(keys.head_dim, values.head_dim) <= 128
    return 6 if spared else MOST_WARPS // own


def turn_queries(
    call: Rows, keys: PartOperands, transform: ChannelTransform, shared: bool, scale: float
) -> list[torch.Tensor]:
    """Queries in code space [BH, rows, E], and their scores of the mean key [BH, rows]."""
    from quantpress.kernels.attend.parts.queries import turn_queries_kernel

    turn = turn_matrix(keys, call.query.device)
    shape = call.heads, call.rows
    y = torch.empty(*shape, len(turn), dtype=torch.float32, device=call.query.device)
    bias = torch.empty(shape, dtype=torch.float32, device=call.query.device)
    quick(turn_queries_kernel)[(call.rows, call.heads, len(turn) // LEAST_CHANNELS)](
        call.query,
        transform.weight,
        transform.mean,
        transform.order,
        turn,
        call.slots,
        y,
        bias,
        scale,
        call.rows,
        call.kv_heads,
        len(turn),
        D=keys.head_dim,
        SIZE=LEAST_CHANNELS,
        HAS_WEIGHT=transform.weight is not None,
        HAS_MEAN=transform.mean is not None,
        ORDERED=transform.order is not None,
        SHARED=shared,
        SLOTS=call.slots is not None,
        num_warps=4,
        **FUSED,
    )
    return [y, bias]


def attend_parts(
    call: Rows,
    prepared: Sequence[torch.Tensor],
    packed: PackedSegment,
    operands: tuple[PartOperands, PartOperands],
    pointers: Sequence[torch.Tensor | None],
    sums: Sequence[torch.Tensor],
    numbers: Sequence[int],
    softcap: float,
    constants: dict[str, Any],
) -> None:
    """Sums over the packed tokens.

    Args:
        call: rows of queries.
        prepared: of `turn_queries`.
        packed: the packed segment.
        operands: of keys and values.
        pointers: lengths, starts, page table and schedule, where there are such.
        sums: written.
        numbers: pages, heads, blocks of rows of a head, and elements from row to row of the page table.
        softcap: in units of log 2, or 0.
        constants: which of the pointers there are.
    """
    from quantpress.kernels.attend.parts.split import split_parts_kernel

    planes, parts = list[torch.Tensor | None](), list[CodePart | None]()
    for side, own in zip((packed.keys, packed.values), operands, strict=True):
        parts += own.parts + (None,) * (2 - len(own.parts))
        for part in parts[-2:]:
            planes += _planes(side, part)
    strides = [stride for plane in planes for stride in _strides(plane)]
    names = "K", "K2", "V", "V2"
    pairs = list(zip(names, parts, strict=True))
    own_constants: dict[str, Any] = {name: part.channels if part else 0 for name, part in pairs}
    own_constants |= {f"{name}_BITS": part.bits if part else 0 for name, part in pairs}
    own_constants |= {f"{name}P": padded_channels(part) for name, part in pairs}
    own_constants |= {"K_REACH": operands[0].parts[0].reach, "V_REACH": operands[1].parts[0].reach}
    weighted = sums[0]
    grid = weighted.shape[1], weighted.shape[0]
    quick(split_parts_kernel)[grid](
        *prepared,
        *level_rows(*operands, call.query.device),
        *planes,
        *pointers,
        *sums,
        *numbers,
        *strides,
        call.rows,
        softcap,
        R=call.block,
        LEVELS=MOST_LEVELS,
        **own_constants,
        **constants,
        num_warps=warps(*operands),
        num_stages=1,
        **FUSED,
    )


def _planes(side: PackedSide, part: CodePart | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if part is None:
        return None, None
    return side.planes[part.codes].view(torch.int32), side.planes[part.scales]


def _strides(plane: torch.Tensor | None) -> tuple[int, int]:
    """Strides from head to head (0 in a pool [N, ...] of pages) and from page to page."""
    if plane is None:
        return 0, 0
    return (plane.stride(1) if plane.dim() == 4 else 0), plane.stride(-2)


def merge_parts(
    call: Rows,
    sums: Sequence[torch.Tensor],
    dense: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    into: int | None,
    values: PartOperands,
    transform: ChannelTransform,
    shared: bool,
    pointers: Sequence[torch.Tensor | None],
    pages: int,
    constants: dict[str, Any],
) -> None:
    """Join all sums into the output, or with `into` those of packed tokens into number `into` of `dense`.

    Args:
        call: rows of queries.
        sums: of packed tokens.
        dense: of 16-bit tokens.
        sinks: learned logits, or None.
        out: written.
        into: None for the output.
        values: operands of the values.
        transform: that of the values.
        shared: whether it holds for every batch entry.
        pointers: heads of the schedule, lengths and starts, where there are such.
        pages: of the longest head.
        constants: which of the pointers there are.
    """
    from quantpress.kernels.attend.parts.merge import merge_parts_kernel

    padded = [padded_channels(part) for part in (*values.parts, None)]
    quick(merge_parts_kernel)[(call.rows, call.heads)](
        *sums,
        *dense,
        sinks,
        turn_matrix(values, out.device),
        transform.order,
        call.slots,
        out,
        *pointers,
        sums[0].shape[1],
        dense[0].shape[1],
        call.rows,
        call.queries,
        call.group,
        call.kv_heads,
        call.blocks,
        0 if into is None else into,
        call.heads,
        pages,
        DV=values.head_dim,
        V=padded[0],
        V2=padded[1],
        R=call.block,
        SIZE=MERGED,
        ORDERED=transform.order is not None,
        SHARED=shared,
        SLOTS=call.slots is not None,
        HAS_SINKS=sinks is not None,
        PARTIAL=into is not None,
        **constants,
        num_warps=8 if values.head_dim <= 128 else 16,
        **FUSED,
    )
