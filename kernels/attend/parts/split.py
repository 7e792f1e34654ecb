"""Attention straight from packed codes of any levels, in one part or two, on 16-bit tensor cores (Triton).

For token t and row r (a query head of the group and a query token), in units of log 2, with parts i:

    s[t, r] = sum_i k_scale_i[t] levels(k_i[t]).y_i[r] + bias[r],    p[t, r] = exp2(s[t, r] - m[r])
    o_i[r] += sum_t p[t, r] v_scale_i[t] levels(v_i[t]),             l[r] += sum_t p[t, r]

Levels are float16 (`levels`). Queries and weights are two float16 each, the second for what the first leaves.
"""

import triton
import triton.language as tl

from quantpress.kernels.attend.dense import tanh
from quantpress.kernels.attend.parts.levels import key_levels, load_words, value_levels
from quantpress.kernels.attend.parts.windows import key_windows, value_windows
from quantpress.kernels.attend.schedule_kernel import pages_of_program

PAGE_TOKENS = tl.constexpr(128)
TILE = tl.constexpr(32)
"""Tokens at a time: those of one part of a page, or of two."""

MOST = tl.constexpr(64.0)
"""The largest weight of a tile times the largest scale becomes this: both halves stay far above the least of
float16."""


@triton.jit
def _halves(x):
    """A float32 tile as the sum of two float16 ones."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _queries(y_ptr, row, kept, CP: tl.constexpr, E: tl.constexpr):
    """Queries [CP, R] of a part, float32."""
    channel = tl.arange(0, CP)
    return tl.load(y_ptr + row[None, :] * E + channel[:, None], mask=kept[None, :], other=0.0)


@triton.jit
def _scales(ptr, inside, live):
    return tl.load(ptr + inside, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _weighted(v, p, vs):
    """[CP, R]: sums over tokens of p[t, r] vs[t] v[c, t]."""
    most = tl.maximum(tl.max(tl.abs(vs), 0), 1e-30)
    high, low = _halves(p * (vs * (MOST / most))[:, None])
    return (tl.dot(v, high) + tl.dot(v, low)) * (most / MOST)


@triton.jit(do_not_specialize=["pages", "heads", "blocks", "page_table_row", "rows"])
def split_parts_kernel(
    y_ptr,
    bias_ptr,
    levels_ptr,
    tables_ptr,
    k_ptr,
    ks_ptr,
    k2_ptr,
    k2s_ptr,
    v_ptr,
    vs_ptr,
    v2_ptr,
    v2s_ptr,
    used_ptr,
    starts_ptr,
    page_table_ptr,
    schedule_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    pages,
    heads,
    blocks,
    page_table_row,
    k_head,
    k_page,
    ks_head,
    ks_page,
    k2_head,
    k2_page,
    k2s_head,
    k2s_page,
    v_head,
    v_page,
    vs_head,
    vs_page,
    v2_head,
    v2_page,
    v2s_head,
    v2s_page,
    rows,
    softcap,
    R: tl.constexpr,
    K_BITS: tl.constexpr,
    K2_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    V2_BITS: tl.constexpr,
    K: tl.constexpr,
    K2: tl.constexpr,
    V: tl.constexpr,
    V2: tl.constexpr,
    KP: tl.constexpr,
    K2P: tl.constexpr,
    VP: tl.constexpr,
    V2P: tl.constexpr,
    K_REACH: tl.constexpr,
    V_REACH: tl.constexpr,
    LEVELS: tl.constexpr,
    USED: tl.constexpr,
    STARTS: tl.constexpr,
    HEADS: tl.constexpr,
    SCHEDULED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Partial softmax sums of one split (axis 0) of one (batch, KV head, block of R rows) (axis 1).

    y: [BH, rows, KP + K2P] and bias [BH, rows] float32, of `turn_queries_kernel`; levels: [4, LEVELS] float16
    and tables: [4, 4] int32, of `level_rows`; k, v: pages of words, int32, with *s, their scales in any float
    dtype, and the same of second parts; K, K2, V, V2: their channels, 0 where there is no second part, and KP
    to V2P padded; K_REACH, V_REACH: of the first parts, 0 where a level is that of one code; softcap in units
    of log 2, or 0; PLAIN: look levels up one by one. Lengths, starts, tables,
    schedules and sums are those of `split_mma_kernel`, with o [A, S, R, VP + V2P].
    """
    head, block, first, last, unused, used = pages_of_program(
        used_ptr, starts_ptr, schedule_ptr, heads, blocks, pages, USED, STARTS, HEADS, SCHEDULED, PAGE_TOKENS
    )
    if HEADS:
        if first >= last:
            return
    else:
        k_ptr += head * k_head
        ks_ptr += head * ks_head
        v_ptr += head * v_head
        vs_ptr += head * vs_head
        if K2:
            k2_ptr += head * k2_head
            k2s_ptr += head * k2s_head
        if V2:
            v2_ptr += head * v2_head
            v2s_ptr += head * v2s_head
    local = tl.arange(0, R)
    row = block % blocks * R + local
    kept = row < rows
    y_ptr += head * rows * (KP + K2P)
    q = _queries(y_ptr, row, kept, KP, KP + K2P)
    largest = tl.maximum(tl.max(tl.abs(q), 0), 1e-30)
    if K2:
        q2 = _queries(y_ptr + KP, row, kept, K2P, KP + K2P)
        largest = tl.maximum(largest, tl.max(tl.abs(q2), 0))
        q2_high, q2_low = _halves(q2 * (1.0 / largest)[None, :])
    q_high, q_low = _halves(q * (1.0 / largest)[None, :])
    bias = tl.load(bias_ptr + head * rows + row, mask=kept, other=0.0)
    m = tl.full([R], -1e30, tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([VP, R], tl.float32)
    if V2:
        acc2 = tl.zeros([V2P, R], tl.float32)
    for step in range(first * 4, last * 4):
        page = head * 0 + step // 4  # int64 like head
        begin = step % 4 * TILE
        inside = begin + tl.arange(0, TILE)
        at = page * PAGE_TOKENS + inside
        live = (at >= unused) & (at < used)
        if HEADS:
            page = tl.load(page_table_ptr + head * page_table_row + page).to(tl.int64)
        if not K_REACH:
            k = load_words(k_ptr + page * k_page, begin, K, KP, K_BITS, False)
        if not V_REACH:
            v = load_words(v_ptr + page * v_page, begin, V, VP, V_BITS, True)
        ks = _scales(ks_ptr + page * ks_page, inside, live)
        vs = _scales(vs_ptr + page * vs_page, inside, live)
        if K2:
            k2 = load_words(k2_ptr + page * k2_page, begin, K2, K2P, K2_BITS, False)
            k2s = _scales(k2s_ptr + page * k2s_page, inside, live)
        if V2:
            v2 = load_words(v2_ptr + page * v2_page, begin, V2, V2P, V2_BITS, True)
            v2s = _scales(v2s_ptr + page * v2s_page, inside, live)
        if K_REACH:
            k = key_windows(k_ptr + page * k_page, begin, levels_ptr, K, KP, K_BITS, K_REACH)
        else:
            k = key_levels(k, begin, levels_ptr, tables_ptr, KP, K_BITS, PLAIN)
        s = (tl.dot(k, q_high) + tl.dot(k, q_low)) * ks[:, None]
        if K2:
            k2 = key_levels(k2, begin, levels_ptr + LEVELS, tables_ptr + 4, K2P, K2_BITS, PLAIN)
            s += (tl.dot(k2, q2_high) + tl.dot(k2, q2_low)) * k2s[:, None]
        s = s * largest[None, :] + bias[None, :]
        if softcap > 0:
            s = softcap * tanh(s / softcap)
        s = tl.where(live[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - new[None, :])
        decay = tl.exp2(m - new)
        m = new
        total = total * decay + tl.sum(p, 0)
        if V_REACH:
            v = value_windows(v_ptr + page * v_page, begin, levels_ptr + 2 * LEVELS, V, VP, V_BITS, V_REACH)
        else:
            v = value_levels(v, begin, levels_ptr + 2 * LEVELS, tables_ptr + 8, VP, V_BITS, PLAIN)
        acc = acc * decay[None, :] + _weighted(v, p, vs)
        if V2:
            v2 = value_levels(v2, begin, levels_ptr + 3 * LEVELS, tables_ptr + 12, V2P, V2_BITS, PLAIN)
            acc2 = acc2 * decay[None, :] + _weighted(v2, p, v2s)
    split, splits = tl.program_id(0), tl.num_programs(0)
    slot = (tl.program_id(1).to(tl.int64) * splits + split) * R + local
    to = o_ptr + slot[None, :] * (VP + V2P)
    tl.store(to + tl.arange(0, VP)[:, None], acc, mask=kept[None, :])
    if V2:
        tl.store(to + VP + tl.arange(0, V2P)[:, None], acc2, mask=kept[None, :])
    at = (tl.program_id(1).to(tl.int64) * R + local) * splits + split
    tl.store(m_ptr + at, m)
    tl.store(l_ptr + at, total)
