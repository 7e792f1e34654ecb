"""Launches the attention kernels for packed tokens: what they support, their settings, their buffers.

There are two launches whatever the length: the first attends the tokens in splits, packed ones and those in
16 bits, and the second joins the sums. Where `opens_call` says no, one more comes before them, which prepares
the queries and attends the 16-bit tokens. Each further packed segment, which has widths and transforms of
its own, takes as many more; the sums over its tokens are joined with those over 16-bit tokens. Nothing is
tuned at run time; each head_dim and pair of widths compiles once.
"""

import contextlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from quantpress.kernels.attend.calls.call import Call
from quantpress.kernels.attend.calls.in_parts import GroupsCall, PartsCall
from quantpress.kernels.attend.calls.settings import LOG2_E
from quantpress.kernels.attend.operands import (
    DenseSegment,
    PackedSegment,
    PackedSide,
    ScalarOperands,
    Segment,
    SignOperands,
    Visibility,
)
from quantpress.kernels.attend.parts.groups import (
    readable_groups,
)
from quantpress.kernels.attend.parts.operands import as_parts
from quantpress.kernels.rotation_matrix import padded

HEAD_DIMS = (64, 128, 256)
"""Channels of a tile on int8 tensor cores."""

WIDTHS = (2, 3, 4, 8)

MOST_HEAD_DIM = 256
"""Up to this 16-bit tensor cores read any head_dim, but for keys that pages store."""

SIGN_HEAD_DIMS, SIGN_WIDTHS = (64, 128, 256), (1, 2, 3, 4)
"""Channels of a tile, and widths, of bit planes there."""

MOST_LAGS = 4
"""Of the filters of bit planes."""

MOST_QUERIES = 128
"""Query tokens of one pass. Rows are query heads of a group times query tokens; a program has 8 or 16."""


def supports(query: torch.Tensor, segments: Sequence[Segment], visibility: Visibility) -> bool:
    """Whether the kernels cover this call: causal, packed segments side by side, codes that they read.

    These are codes of 1 to 4 and 8 bits, in one group of channels or two, with or without a sketch; and 1 to
    4 bit planes. At most one dense segment may lie in front of the packed ones, and one behind them.
    Where the last segment has lengths, the tokens of several queries must be among its tokens in use.
    """
    packed = [index for index, segment in enumerate(segments) if isinstance(segment, PackedSegment)]
    inside = packed == [*range(packed[0], packed[-1] + 1)] if packed else False
    if not inside or packed[0] > 1 or len(segments) - packed[-1] > 2 or visibility.dropped is not None:
        return False
    if visibility.mask is not None or not (visibility.causal or query.shape[2] == 1):
        return False
    after = sum(segment.tokens for segment in segments[packed[-1] + 1 :])
    if not _reachable(query, [one for one in segments if isinstance(one, DenseSegment)]):
        return False
    pages = [one for one in segments if isinstance(one, PackedSegment)]
    if not all(_readable(one) or _readable_in_parts(one) for one in pages):
        return False
    return query.shape[2] == 1 or after >= query.shape[2]


def _reachable(query: torch.Tensor, dense: list[DenseSegment]) -> bool:
    """Whether the first kernel reads the 16-bit tokens: all by table, from pools as it wants, or none."""
    by_table = [segment for segment in dense if segment.table is not None]
    pools = [pool for segment in by_table for pool in (segment.keys, segment.values)]
    return len(by_table) in (0, len(dense)) and all(
        pool.dtype == query.dtype and pool.stride(3) == 1 and pool.stride(2) == pool.shape[3]
        for pool in pools
    )


def _readable(pages: PackedSegment) -> bool:
    """Whether int8 tensor cores read keys and values."""
    return all(_readable_side(side) for side in (pages.keys, pages.values))


def _readable_side(side: PackedSide) -> bool:
    operands = side.codec.kernel_operands()
    if side.transform.order is not None:
        return False
    if isinstance(operands, SignOperands):
        taps = {len(lags) for lags in operands.filters}
        planes = operands.bits > 1 and len(taps) == 1 and max(taps) <= MOST_LAGS if taps else True
        return planes and operands.bits in SIGN_WIDTHS and operands.head_dim in SIGN_HEAD_DIMS
    if not isinstance(operands, ScalarOperands):
        return False
    fits = operands.bits in WIDTHS and (operands.bits < 8 or not operands.fine)
    return fits and in_tiles(operands.head_dim)


def in_tiles(head_dim: int) -> bool:
    """Whether int8 tensor cores read scalar codes of so many channels, each lane 16 of a key at a time."""
    return padded(head_dim) in HEAD_DIMS and head_dim % 16 == 0


def _readable_in_parts(pages: PackedSegment) -> bool:
    """Whether 16-bit tensor cores read keys and values."""
    sides = (pages.keys, pages.values)
    found = [side.codec.kernel_operands() for side in sides]
    parts = [None if one is None else as_parts(one) for one in found]
    shift = pages.values.transform.mean is not None or pages.values.transform.weight is not None
    return not shift and all(one is not None and one.head_dim <= MOST_HEAD_DIM for one in parts)


def attend_triton(
    query: torch.Tensor,
    segments: Sequence[Segment],
    visibility: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plain: bool = False,
    newer: int = 0,
) -> torch.Tensor:
    """As `quantpress.kernels.attend.attend`, for calls that `supports` accepts.

    More than `MOST_QUERIES` query tokens go in passes of equal size, each of which reads all tokens.

    Args:
        query: [B, Hq, Tq, D].
        segments: the tokens in order.
        visibility: one that `supports` accepts.
        scaling: factor on q.k.
        softcap: as for `attend`.
        sinks: as for `attend`.
        slots: as for `attend`.
        out: as for `attend`.
        plain: compute in float32 with plain loads, for Triton's interpreter.
        newer: tokens in use at the end that none of these queries sees: those of later passes.

    Returns:
        [B, Hq, Tq, Dv] in the query's dtype.
    """
    if query.shape[2] > MOST_QUERIES:
        bounds = pass_bounds(query.shape[2])
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        options |= {"slots": slots, "plain": plain}
        parts = [
            attend_triton(query[:, :, low:high], segments, visibility, newer=query.shape[2] - high, **options)
            for low, high in pairwise(bounds)
        ]
        return torch.cat(parts, 2, out=out)
    before, after = (one if isinstance(one, DenseSegment) else None for one in (segments[0], segments[-1]))
    packed = [one for one in segments if isinstance(one, PackedSegment)]
    cap = 0.0 if softcap is None else softcap * LOG2_E
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        numbers = scaling * LOG2_E, cap, plain
        calls = [call_of(query, one, plain)(query, one, slots, *numbers) for one in packed]
        for one in calls:
            one.cut(min(other.block for other in calls))
        *others, call = calls
        prepared, dense = call.first(before, after, newer, len(others))
        for number, other in enumerate(others, dense[0].shape[1] - len(others)):
            other.merge(other.attend(other.first()[0]), dense, into=number)
        return call.merge(call.attend(prepared), dense, sinks, out)


def call_of(query: torch.Tensor, packed: PackedSegment, plain: bool) -> type[Call]:
    """The kind of call for a segment that `supports` accepts."""
    if _readable(packed):
        return Call
    return GroupsCall if not plain and readable_groups(query, packed) else PartsCall


def pass_bounds(queries: int) -> list[int]:
    """Where passes over query tokens begin and end: as few as there may be, and about equally long."""
    passes = -(-queries // MOST_QUERIES)
    return [queries * number // passes for number in range(passes + 1)]
