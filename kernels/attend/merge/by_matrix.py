"""The last launch for any rotation and for bit planes (Triton)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from quantpress.kernels.attend.schedule_kernel import chunks_of_heads
from quantpress.kernels.padding import padded

LOG2_E = tl.constexpr(1.4426950408889634)
TILES = tl.constexpr(16)
"""Partial sums over 16-bit tokens that are joined at a time."""


@triton.jit
def _load(
    o_ptr,
    m_ptr,
    l_ptr,
    start,
    end,
    count,
    block,
    local,
    DV: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Partial sums `start` to `end` of the `count` of a row, at most SIZE: o [SIZE, DV], m and l [SIZE].

    o has PLANES sums of DV channels for each row, of which o_ptr points to one.
    """
    split = start + tl.arange(0, SIZE)
    live = split < end
    slot = (block * count + split) * R + local
    o = tl.load(
        o_ptr + slot[:, None] * (PLANES * DV) + tl.arange(0, DV)[None, :], mask=live[:, None], other=0.0
    )
    at = (block * R + local) * count + split
    m = tl.load(m_ptr + at, mask=live, other=-1e30)
    return o, m, tl.load(l_ptr + at, mask=live, other=0.0)


@triton.jit
def joined_weights(m, total, part_m, part_l):
    """Join partial sums part_m and part_l [N] to m and total [1]; the factors of the old and the new ones."""
    new = tl.maximum(m, tl.max(part_m, 0))
    decay, weight = tl.exp2(m - new), tl.exp2(part_m - new)
    return new, total * decay + tl.sum(part_l * weight, 0), decay, weight


@triton.jit
def _join(m, total, y, part_o, part_m, part_l):
    """Add partial sums part_o [N, DV], part_m and part_l [N] to m, total [1] and y [DV]."""
    m, total, decay, weight = joined_weights(m, total, part_m, part_l)
    return m, total, y * decay + tl.sum(part_o * weight[:, None], 0)


@triton.jit
def _of_lag(
    y0, y1, y2, y3, lag: tl.constexpr, PLANES: tl.constexpr, LAGS: tl.constexpr, FILTERS: tl.constexpr
):
    """What the taps of one lag make of the sums of all bit planes."""
    z = y0 * FILTERS[lag] + y1 * FILTERS[LAGS + lag]
    if PLANES > 2:
        z += y2 * FILTERS[2 * LAGS + lag]
    if PLANES > 3:
        z += y3 * FILTERS[3 * LAGS + lag]
    return z


@triton.jit
def _matrix(rotation_ptr, DV: tl.constexpr, P: tl.constexpr):
    """The rotation [DV, DV] float32, as [P, P] with zeros behind it: to convert it takes 0.5 us."""
    value = tl.arange(0, P)
    at = rotation_ptr + value[:, None] * DV + value[None, :]
    if P == DV:
        turn = tl.load(at)
    else:
        there = value < DV
        turn = tl.load(at, mask=there[:, None] & there[None, :], other=0.0)
    return turn


_NUMBERS = ["splits", "tiles", "rows", "queries", "group", "kv_heads", "blocks", "heads", "pages", "into"]


@triton.jit(do_not_specialize=_NUMBERS)
def merge_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    dense_o_ptr,
    dense_m_ptr,
    dense_l_ptr,
    sinks_ptr,
    rotation_ptr,
    out_ptr,
    schedule_ptr,
    splits,
    tiles,
    rows,
    queries,
    group,
    kv_heads,
    blocks,
    into,
    unit,
    used_ptr,
    starts_ptr,
    heads,
    pages,
    DV: tl.constexpr,
    R: tl.constexpr,
    PLANES: tl.constexpr,
    FILTERS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    STARTS: tl.constexpr,
    SCHEDULED: tl.constexpr,
    EACH: tl.constexpr,
    PARTIAL: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Join the splits of EACH rows (axis 0) of one (batch, KV head) (axis 1), rotate back, add 16-bit tokens.

    o: [N, splits, R, DV], m and l: [N, R, splits], sums over packed tokens in code space, N = heads * blocks;
    dense_o, dense_m, dense_l: the same over 16-bit tokens, with `tiles` in place of `splits`; in both o DV is
    `padded`; sinks: [Hkv * group] logits, if HAS_SINKS; rotation: [DV, DV] float32, out of code space but for
    the factor `unit`; out: [BH, rows, DV], written; SIZE: partial sums joined at a time. Where PLANES is 2 to
    4, values are so many bit planes, o is [N, splits, R, PLANES, DV], and taps FILTERS, plane by plane, make
    one vector of them. Where HEADS, a power of two of at least `heads`, is not 0, heads have page tables: o,
    m and l are [blocks, splits, ...], and the splits belong to heads as `chunks_of_heads` says, of used and
    starts [heads] int32 and pages, or, if SCHEDULED, as schedule [BH, 2] int32 says. PARTIAL: the sums over
    packed tokens, rotated back, are written to dense_o, dense_m and dense_l as number `into` of their
    `tiles`; nothing else is read or written. CHAINED: started before the split kernel has ended.
    """
    head = tl.program_id(1).to(tl.int64)
    begin, end = 0, splits
    if SCHEDULED:
        begin = tl.load(schedule_ptr + head * 2)
        end = tl.load(schedule_ptr + head * 2 + 1)
    elif HEADS:
        _, _, chunks = chunks_of_heads(used_ptr, starts_ptr, heads, pages, splits, HEADS, STARTS, 128)
        index = tl.arange(0, HEADS)
        begin = tl.sum(tl.where(index < head, chunks, 0), 0)
        end = begin + tl.sum(tl.where(index == head, chunks, 0), 0)
    P: tl.constexpr = padded(DV)
    value = tl.arange(0, P)
    there = value < DV
    COUNT: tl.constexpr = PLANES if PLANES else 1
    if P <= 128:  # a larger matrix does not fit into registers beside the sums
        turn = _matrix(rotation_ptr, DV, P)
    if CHAINED:
        gdc_wait()
    for step in range(EACH):
        row = tl.minimum(tl.program_id(0) * EACH + step, rows - 1)
        block, local = head * blocks + row // R, row % R
        holder = block
        if HEADS:
            holder = head * 0 + row // R
        m = tl.full([1], -1e30, tl.float32)
        total = tl.zeros([1], tl.float32)
        y = tl.zeros([P], tl.float32)
        o, ms, ls = _load(o_ptr, m_ptr, l_ptr, begin, end, splits, holder, local, P, R, SIZE, COUNT)
        if PLANES:
            one, two, three = o_ptr + P, o_ptr + 2 * P, o_ptr + 3 * P
            o1, ms, ls = _load(one, m_ptr, l_ptr, begin, end, splits, holder, local, P, R, SIZE, COUNT)
            o2 = o1
            if PLANES > 2:
                o2, ms, ls = _load(two, m_ptr, l_ptr, begin, end, splits, holder, local, P, R, SIZE, COUNT)
            o3 = o2
            if PLANES > 3:
                o3, ms, ls = _load(three, m_ptr, l_ptr, begin, end, splits, holder, local, P, R, SIZE, COUNT)
        if not PARTIAL:
            dense_o, dense_ms, dense_ls = _load(
                dense_o_ptr, dense_m_ptr, dense_l_ptr, 0, tiles, tiles, block, local, P, R, TILES, 1
            )
        if PLANES:
            m, total, decay, weight = joined_weights(m, total, ms, ls)
            y = tl.sum(o * weight[:, None], 0)
            y1 = tl.sum(o1 * weight[:, None], 0)
            y2 = tl.sum(o2 * weight[:, None], 0)
            y3 = tl.sum(o3 * weight[:, None], 0)
        else:
            m, total, y = _join(m, total, y, o, ms, ls)
        for start in range(begin + SIZE, end, SIZE):
            o, ms, ls = _load(o_ptr, m_ptr, l_ptr, start, end, splits, holder, local, P, R, SIZE, COUNT)
            if PLANES:
                o1, ms, ls = _load(one, m_ptr, l_ptr, start, end, splits, holder, local, P, R, SIZE, COUNT)
                o2 = o1
                if PLANES > 2:
                    o2, ms, ls = _load(
                        two, m_ptr, l_ptr, start, end, splits, holder, local, P, R, SIZE, COUNT
                    )
                o3 = o2
                if PLANES > 3:
                    o3, ms, ls = _load(
                        three, m_ptr, l_ptr, start, end, splits, holder, local, P, R, SIZE, COUNT
                    )
                m, total, decay, weight = joined_weights(m, total, ms, ls)
                y = y * decay + tl.sum(o * weight[:, None], 0)
                y1 = y1 * decay + tl.sum(o1 * weight[:, None], 0)
                y2 = y2 * decay + tl.sum(o2 * weight[:, None], 0)
                y3 = y3 * decay + tl.sum(o3 * weight[:, None], 0)
            else:
                m, total, y = _join(m, total, y, o, ms, ls)
        if PLANES:
            LAGS: tl.constexpr = len(FILTERS) // PLANES
            of_planes = y
            y = _of_lag(of_planes, y1, y2, y3, 0, PLANES, LAGS, FILTERS)
            for lag in tl.static_range(1, LAGS):
                later = _of_lag(of_planes, y1, y2, y3, lag, PLANES, LAGS, FILTERS)
                y += tl.gather(later, (value + (DV - lag)) % DV, 0)
        if P > 128:
            turn = _matrix(rotation_ptr, DV, P)
        turned = tl.sum(turn * (y * unit)[:, None], 0)
        if PARTIAL:
            tl.store(dense_o_ptr + ((block * tiles + into) * R + local) * P + value, turned)
            to = (block * R + local) * tiles + into + tl.arange(0, 1)
            tl.store(dense_m_ptr + to, m)
            tl.store(dense_l_ptr + to, total)
        else:
            m, total, turned = _join(m, total, turned, dense_o, dense_ms, dense_ls)
            for start in range(TILES, tiles, TILES):
                dense_o, dense_ms, dense_ls = _load(
                    dense_o_ptr, dense_m_ptr, dense_l_ptr, start, tiles, tiles, block, local, P, R, TILES, 1
                )
                m, total, turned = _join(m, total, turned, dense_o, dense_ms, dense_ls)
            if HAS_SINKS:
                sink = tl.load(sinks_ptr + head % kv_heads * group + row // queries).to(tl.float32) * LOG2_E
                new = tl.maximum(m, sink)
                decay = tl.exp2(m - new)
                turned = turned * decay
                total = total * decay + tl.exp2(sink - new)
            total = tl.where(total == 0, 1.0, total)  # nothing in use
            tl.store(
                out_ptr + (head * rows + row) * DV + value, turned / total, mask=there if P != DV else None
            )
