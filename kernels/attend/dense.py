"""Attention to 16-bit tokens (Triton): tiles of them, and the kernels for layers that are not packed.

`quantpress.kernels.attend.prepare` attends the 16-bit tokens beside packed ones with the same tiles.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from quantpress.kernels.padding import padded

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def there(live, channel, C: tl.constexpr):
    """What is `live`, but for channels beyond the C that there are; both broadcast."""
    if padded(C) != C:
        live = live & (channel < C)
    return live


@triton.jit
def tanh(x):
    """Hyperbolic tangent of a float32 tile, without libdevice."""
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, e - 1, 1 - e) / (1 + e)


@triton.jit
def load_tile(
    k_ptr,
    v_ptr,
    start,
    begin,
    end,
    D: tl.constexpr,
    DV: tl.constexpr,
    TILE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Keys [TILE, D] and values [DV, TILE], D and DV `padded`; zero for tokens outside `begin` to `end`.

    start: the first token; k_ptr, v_ptr: the head's keys [tokens, D] and values [tokens, DV], contiguous.
    PLAIN: load as float32.
    """
    at = start + tl.arange(0, TILE)
    channel, value = tl.arange(0, padded(D))[None, :], tl.arange(0, padded(DV))[:, None]
    live = (at >= begin) & (at < end)
    k = tl.load(k_ptr + at[:, None] * D + channel, mask=there(live[:, None], channel, D), other=0.0)
    v = tl.load(v_ptr + at[None, :] * DV + value, mask=there(live[None, :], value, DV), other=0.0)
    if PLAIN:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    return k, v


@triton.jit
def load_paged_tile(
    k_ptr,
    v_ptr,
    page_table_ptr,
    page,
    inside,
    live,
    k_page,
    v_page,
    D: tl.constexpr,
    DV: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """As `load_tile`, where the tokens of a tile lie in pages of a pool; zero where not `live`.

    k_ptr, v_ptr: the head's keys and values in row 0 of the pools, k_page and v_page from row to row;
    page_table_ptr: [P] int32, the rows of the batch entry's pages; page, inside, live: [TILE], the page of
    each token, its place there, and whether it is in use.
    """
    pool_row = tl.load(page_table_ptr + page, mask=live, other=0).to(tl.int64)
    channel, value = tl.arange(0, padded(D))[None, :], tl.arange(0, padded(DV))[:, None]
    k_at = pool_row * k_page + inside * D
    v_at = pool_row * v_page + inside * DV
    k = tl.load(k_ptr + k_at[:, None] + channel, mask=there(live[:, None], channel, D), other=0.0)
    v = tl.load(v_ptr + v_at[None, :] + value, mask=there(live[None, :], value, DV), other=0.0)
    if PLAIN:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    return k, v


@triton.jit
def load_queries(query_ptr, head, skipped, rows, D: tl.constexpr, R: tl.constexpr, PLAIN: tl.constexpr):
    """Rows `skipped` to `skipped` + R of a head's queries as [D, 2R], D `padded`, the second half zero.

    query_ptr: [BH, rows, D]; head: which of BH; PLAIN: load as float32.
    """
    column = tl.arange(0, 2 * R)
    live = (column < R) & (skipped + column < rows)
    channel = tl.arange(0, padded(D))[:, None]
    at = (head * rows + skipped + column[None, :]) * D + channel
    q = tl.load(query_ptr + at, mask=there(live[None, :], channel, D), other=0.0)
    if PLAIN:
        q = q.to(tl.float32)
    return q


@triton.jit
def attend_tile(
    q,
    query,
    k,
    v,
    start,
    begin,
    end,
    hidden,
    scale,
    softcap,
    DV: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Softmax sums over the tokens of a tile that lie in `begin` to `end`: m and l [R], o [DV, R].

    D and DV are `padded` in q, k, v and o. q: [D, 2R] from `load_queries`; query: [R], the query token of
    each row; k, v: from `load_tile`; start: first token of the tile; hidden: query token i does not see the
    last hidden - i tokens; scale, softcap: on scores in units of log 2, no cap where softcap is 0. The
    weights are split into a high part and a residual in the values' dtype. CHAINED: the next kernel may start
    once the tile is loaded.
    """
    at = start + tl.arange(0, TILE)
    live = (at >= begin) & (at < end)
    both = tl.dot(k, q, input_precision="ieee")
    s = tl.sum(tl.reshape(both, [TILE, 2, R]), 1) * scale
    if softcap > 0:
        s = softcap * tanh(s / softcap)
    seen = live[:, None] & (at[:, None] < end - tl.maximum(hidden - query[None, :], 0))
    s = tl.where(seen, s, float("-inf"))
    m = tl.maximum(tl.max(s, 0), -1e30)
    if CHAINED:
        gdc_launch_dependents()
    p = tl.exp2(s - m[None, :])
    column = tl.arange(0, 2 * R)
    twice = tl.reshape(tl.broadcast_to(p[:, None, :], [TILE, 2, R]), [TILE, 2 * R])
    high = twice.to(v.dtype)
    split = tl.where(column[None, :] < R, high.to(tl.float32), twice - high.to(tl.float32)).to(v.dtype)
    o = tl.dot(v, split, input_precision="ieee")
    return m, tl.sum(p, 0), tl.sum(tl.reshape(o, [padded(DV), 2, R]), 1)


@triton.jit(do_not_specialize=["rows", "blocks", "tokens"])
def dense_split_kernel(
    query_ptr,
    k_ptr,
    v_ptr,
    used_ptr,
    starts_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    scale,
    softcap,
    rows,
    blocks,
    tokens,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    USED: tl.constexpr,
    STARTS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Softmax sums of each split (axis 0) of a (batch, KV head, block of R rows) (axis 1), N in all.

    query: [BH, rows, D]; k: [BH, tokens, D] and v: [BH, tokens, DV], contiguous; o: [N, SPLITS, R, DV], m and
    l: [N, SPLITS, R] float32, written; used: [BH] int32, tokens in use of each head, if USED; starts: [BH]
    int32, the first of them, if STARTS. Only tokens in use are loaded and divided among the splits. scale,
    softcap: in units of log 2. PLAIN: compute in float32.
    """
    split, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, skipped = block // blocks, block % blocks * R
    begin, end = 0, tokens
    if STARTS:
        begin = tl.load(starts_ptr + head)
    if USED:
        end = tl.minimum(end, begin + tl.load(used_ptr + head))
    span = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), TILE), SPLITS) * TILE
    low = begin + split * span
    high = tl.minimum(low + span, end)
    row, value = tl.arange(0, R), tl.arange(0, padded(DV))[:, None]
    q = load_queries(query_ptr, head, skipped, rows, D, R, PLAIN)
    k_ptr += head * tokens * D
    v_ptr += head * tokens * DV
    m = tl.full([R], -1e30, tl.float32)
    total = tl.zeros([R], tl.float32)
    out = tl.zeros([padded(DV), R], tl.float32)
    for start in range(low, high, TILE):
        k, v = load_tile(k_ptr, v_ptr, start, low, high, D, DV, TILE, PLAIN)
        tile_m, tile_total, tile_out = attend_tile(
            q, 0 * row, k, v, start, low, high, 0, scale, softcap, DV, R, TILE, False
        )
        highest = tl.maximum(m, tile_m)
        old, new = tl.exp2(m - highest), tl.exp2(tile_m - highest)
        total = total * old + tile_total * new
        out = out * old[None, :] + tile_out * new[None, :]
        m = highest
    slot = (block * SPLITS + split) * R + row
    if padded(DV) == DV:
        tl.store(o_ptr + slot[None, :] * DV + value, out)
    else:
        tl.store(o_ptr + slot[None, :] * DV + value, out, mask=value < DV)
    tl.store(m_ptr + slot, m)
    tl.store(l_ptr + slot, total)


@triton.jit(do_not_specialize=["rows", "group", "kv_heads", "blocks"])
def dense_merge_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    sinks_ptr,
    out_ptr,
    rows,
    group,
    kv_heads,
    blocks,
    DV: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Join the splits of one row (axis 0) of a (batch, KV head) (axis 1).

    o, m, l: from `dense_split_kernel`; sinks: [Hq] logits, if HAS_SINKS; out: [BH, rows, DV], written.
    """
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, value = tl.arange(0, SPLITS), tl.arange(0, padded(DV))
    slot = ((head * blocks + row // R) * SPLITS + split) * R + row % R
    m, total = tl.load(m_ptr + slot), tl.load(l_ptr + slot)
    highest = tl.max(m, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head % kv_heads * group + row).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    weight = tl.exp2(m - highest)
    whole = tl.sum(total * weight, 0)
    if HAS_SINKS:
        whole += tl.exp2(sink - highest)
    live = value < DV
    parts = tl.load(o_ptr + slot[:, None] * DV + value[None, :], mask=live[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out_ptr + (head * rows + row) * DV + value, out.to(out_ptr.dtype.element_ty), mask=live)
