"""Launches the Triton kernels for one query token over 16-bit tokens alone, in layers that are not packed."""

import contextlib
from collections.abc import Sequence

import torch

from quantpress.kernels.attend.calls.settings import DENSE_TILE, LOG2_E, block_rows
from quantpress.kernels.attend.operands import DenseSegment, Segment, Visibility
from quantpress.kernels.available import FUSED

MOST_HEAD_DIM = 256
SPLIT_TOKENS = 128
"""A split of fewer tokens would cost more in the merge than it saves."""

MOST_SPLITS = 64
PROGRAMS = 4
"""Programs per multiprocessor."""

PLAIN_PROGRAMS = 8
"""Programs in all in Triton's interpreter."""


def supports_dense(query: torch.Tensor, segments: Sequence[Segment], visibility: Visibility) -> bool:
    """Whether the kernels cover this call: one query token that sees every token in use of one segment."""
    if len(segments) != 1 or query.shape[2] != 1:
        return False
    segment = segments[0]
    if not isinstance(segment, DenseSegment) or segment.table is not None:
        return False
    if visibility.mask is not None or visibility.dropped is not None:
        return False
    states = (segment.keys, segment.values)
    return all(
        one.shape[-1] <= MOST_HEAD_DIM and one.is_contiguous() and one.dtype == query.dtype for one in states
    )


def attend_dense(
    query: torch.Tensor,
    segments: Sequence[Segment],
    visibility: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    plain: bool = False,
) -> torch.Tensor:
    """As `quantpress.kernels.attend.attend`, for calls that `supports_dense` accepts.

    Args:
        query: [B, Hq, 1, D].
        segments: one dense segment.
        visibility: a `Visibility` without a mask.
        scaling: factor on q.k.
        softcap: as for `attend`.
        sinks: as for `attend`.
        plain: compute in float32, for Triton's interpreter.

    Returns:
        [B, Hq, 1, Dv] in the query's dtype.
    """
    from quantpress.kernels.attend.dense import dense_merge_kernel, dense_split_kernel

    (segment,) = segments
    assert isinstance(segment, DenseSegment)
    batch, query_heads, _, dim = query.shape
    heads, group, value_dim = (
        batch * segment.kv_heads,
        query_heads // segment.kv_heads,
        segment.values.shape[-1],
    )
    block = block_rows(group, max(dim, value_dim))
    blocks = -(-group // block)
    splits = dense_splits(segment.tokens, heads * blocks, _programs(query.device, plain))
    query = query.contiguous()
    used, starts = (None if one is None else one.contiguous() for one in (segment.lengths, segment.starts))
    shape = heads * blocks, splits, block
    sums = query.new_empty(*shape, value_dim, dtype=torch.float32)
    most, total = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    out = query.new_empty(batch, query_heads, 1, value_dim)
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        dense_split_kernel[(splits, heads * blocks)](
            query,
            segment.keys,
            segment.values,
            used,
            starts,
            sums,
            most,
            total,
            scaling * LOG2_E,
            0.0 if softcap is None else softcap * LOG2_E,
            group,
            blocks,
            segment.tokens,
            D=dim,
            DV=value_dim,
            R=block,
            TILE=DENSE_TILE,
            SPLITS=splits,
            USED=used is not None,
            STARTS=starts is not None,
            PLAIN=plain,
            num_warps=8 if max(dim, value_dim) > 128 else 4,
            num_stages=2,
            **FUSED,
        )
        dense_merge_kernel[(group, heads)](
            sums,
            most,
            total,
            sinks,
            out,
            group,
            group,
            segment.kv_heads,
            blocks,
            DV=value_dim,
            R=block,
            SPLITS=splits,
            HAS_SINKS=sinks is not None,
            num_warps=4,
            **FUSED,
        )
    return out


def dense_splits(tokens: int, blocks: int, programs: int) -> int:
    """Number of splits of the tokens of a block: a power of two, so that all splits fill the GPU about once.

    Args:
        tokens: tokens of the segment.
        blocks: B * Hkv * blocks of rows.
        programs: programs that the GPU runs at a time.
    """
    wanted = max(1, min(-(-tokens // SPLIT_TOKENS), programs // blocks, MOST_SPLITS))
    return 1 << (wanted.bit_length() - 1)


def _programs(device: torch.device, plain: bool) -> int:
    if plain:
        return PLAIN_PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
