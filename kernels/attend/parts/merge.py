"""The last launch for codes in parts (Triton)."""

import triton
import triton.language as tl

from quantpress.kernels.attend.merge.by_matrix import joined_weights
from quantpress.kernels.attend.schedule_kernel import chunks_of_heads
from quantpress.kernels.padding import padded

LOG2_E = tl.constexpr(1.4426950408889634)
TILES = tl.constexpr(16)
"""Partial sums over 16-bit tokens that are joined at a time."""


@triton.jit
def _turned(y, turn_ptr, C: tl.constexpr, D: tl.constexpr):
    """turn.T y of rows C of the matrix: [D], `padded`."""
    channel = tl.arange(0, padded(D))[None, :]
    turn = tl.load(turn_ptr + tl.arange(0, C)[:, None] * D + channel, mask=channel < D, other=0.0)
    return tl.sum(turn * y[:, None], 0)


_NUMBERS = ["splits", "tiles", "rows", "queries", "group", "kv_heads", "blocks", "into", "heads", "pages"]


@triton.jit(do_not_specialize=_NUMBERS)
def merge_parts_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    dense_o_ptr,
    dense_m_ptr,
    dense_l_ptr,
    sinks_ptr,
    turn_ptr,
    order_ptr,
    slots_ptr,
    out_ptr,
    schedule_ptr,
    used_ptr,
    starts_ptr,
    splits,
    tiles,
    rows,
    queries,
    group,
    kv_heads,
    blocks,
    into,
    heads,
    pages,
    DV: tl.constexpr,
    V: tl.constexpr,
    V2: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    ORDERED: tl.constexpr,
    SHARED: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HEADS: tl.constexpr,
    STARTS: tl.constexpr,
    SCHEDULED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """Join the splits of one row (axis 0) of one (batch, KV head) (axis 1), turn back, add 16-bit tokens.

    o: [N, splits, R, V + V2], m and l [N, R, splits], of `split_parts_kernel`; turn: [V + V2, DV] float32;
    order: as for `turn_queries_kernel`: channel i before it is channel order[i] of the output. All else is as
    for `merge_kernel`.
    """
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, end = 0, splits
    if SCHEDULED:
        begin = tl.load(schedule_ptr + head * 2)
        end = tl.load(schedule_ptr + head * 2 + 1)
    elif HEADS:
        _, _, chunks = chunks_of_heads(used_ptr, starts_ptr, heads, pages, splits, HEADS, STARTS, 128)
        index = tl.arange(0, HEADS)
        begin = tl.sum(tl.where(index < head, chunks, 0), 0)
        end = begin + tl.sum(tl.where(index == head, chunks, 0), 0)
    channel = tl.arange(0, padded(DV))
    live = channel < DV
    if ORDERED:
        own = head
        if SLOTS:
            own = tl.load(slots_ptr + head // kv_heads) * kv_heads + head % kv_heads
        if SHARED:
            own = head % kv_heads
        channel = tl.load(order_ptr + own * DV + channel, mask=live, other=DV).to(tl.int32)
    block, local = head * blocks + row // R, row % R
    holder = block
    if HEADS:
        holder = head * 0 + row // R
    m = tl.full([1], -1e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    y = tl.zeros([V], tl.float32)
    if V2:
        y2 = tl.zeros([V2], tl.float32)
    for start in range(begin, end, SIZE):
        split = start + tl.arange(0, SIZE)
        within = split < end
        at = (holder * R + local) * splits + split
        part_m = tl.load(m_ptr + at, mask=within, other=-1e30)
        part_l = tl.load(l_ptr + at, mask=within, other=0.0)
        m, total, decay, weight = joined_weights(m, total, part_m, part_l)
        from_o = o_ptr + ((holder * splits + split) * R + local)[:, None] * (V + V2)
        o = tl.load(from_o + tl.arange(0, V)[None, :], mask=within[:, None], other=0.0)
        y = y * decay + tl.sum(o * weight[:, None], 0)
        if V2:
            o2 = tl.load(from_o + V + tl.arange(0, V2)[None, :], mask=within[:, None], other=0.0)
            y2 = y2 * decay + tl.sum(o2 * weight[:, None], 0)
    turned = _turned(y, turn_ptr, V, DV)
    if V2:
        turned += _turned(y2, turn_ptr + V * DV, V2, DV)
    if PARTIAL:
        tl.store(dense_o_ptr + ((block * tiles + into) * R + local) * padded(DV) + channel, turned, mask=live)
        to = (block * R + local) * tiles + into + tl.arange(0, 1)
        tl.store(dense_m_ptr + to, m)
        tl.store(dense_l_ptr + to, total)
    else:
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            within = tile < tiles
            at = (block * R + local) * tiles + tile
            part_m = tl.load(dense_m_ptr + at, mask=within, other=-1e30)
            part_l = tl.load(dense_l_ptr + at, mask=within, other=0.0)
            m, total, decay, weight = joined_weights(m, total, part_m, part_l)
            from_o = dense_o_ptr + ((block * tiles + tile) * R + local)[:, None] * padded(DV)
            o = tl.load(from_o + channel[None, :], mask=within[:, None] & live[None, :], other=0.0)
            turned = turned * decay + tl.sum(o * weight[:, None], 0)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head % kv_heads * group + row // queries).to(tl.float32) * LOG2_E
            new = tl.maximum(m, sink)
            decay = tl.exp2(m - new)
            turned = turned * decay
            total = total * decay + tl.exp2(sink - new)
        total = tl.where(total == 0, 1.0, total)  # nothing in use
        to = out_ptr + (head * rows + row) * DV + channel
        tl.store(to, (turned / total).to(out_ptr.dtype.element_ty), mask=live)
