"""The first launch (Triton): queries go into code space, and the 16-bit tokens are attended."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from quantpress.kernels.attend.dense import attend_tile, load_paged_tile, load_queries, load_tile
from quantpress.kernels.padding import padded

MOST = tl.constexpr(32512.0)
"""Query coordinates are counted in units of their largest over 127 * 256: the high byte stays below 128."""


@triton.jit
def _rotation(halves_ptr, C: tl.constexpr, HALVES: tl.constexpr):
    """A rotation without its factor, [C, C] with rows in code space, from float16 halves [HALVES, C, C]."""
    channel = tl.arange(0, C)
    at = halves_ptr + channel[:, None] * C + channel[None, :]
    turn = tl.load(at).to(tl.float32)
    if HALVES == 2:
        turn += tl.load(at + C * C).to(tl.float32)
    return turn


@triton.jit
def _of_plane(y0, y1, y2, y3, plane: tl.constexpr, LAGS: tl.constexpr, FILTERS: tl.constexpr):
    """The query of a bit plane: sum over lags of its taps times y[t + lag]."""
    z = y0 * FILTERS[plane * LAGS]
    if LAGS > 1:
        z += y1 * FILTERS[plane * LAGS + 1]
    if LAGS > 2:
        z += y2 * FILTERS[plane * LAGS + 2]
    if LAGS > 3:
        z += y3 * FILTERS[plane * LAGS + 3]
    return z


@triton.jit
def _prepare(
    query_ptr,
    weight_ptr,
    mean_ptr,
    halves_ptr,
    q_ptr,
    factor_ptr,
    start_ptr,
    bias_ptr,
    scale,
    unit,
    turn_factor,
    rows,
    block,
    head,
    own,
    local,
    row,
    D: tl.constexpr,
    R: tl.constexpr,
    HALVES: tl.constexpr,
    PLANES: tl.constexpr,
    FILTERS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Bring one row of the queries into code space, as whole numbers n = 256 * high + low of 16 bits.

    Pointers and constants are those of `prepare_kernel`; block: which of N; head: which of BH; own: the
    sequence's head whose weight and mean are read; local: the row within its block; row: within its head.

    Everything is loaded before the first sum, which the loads would otherwise wait for, and before the next
    kernel starts, whose first loads are of several MB.
    """
    P: tl.constexpr = padded(D)
    channel = tl.arange(0, P)
    turn = _rotation(halves_ptr, P, HALVES)
    live = channel < D
    x = tl.load(query_ptr + (head * rows + row) * D + channel, mask=live, other=0.0).to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + own * D + channel, mask=live, other=0.0)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + own * D + channel, mask=live, other=1.0)
    weighed = x * turn_factor
    if HAS_WEIGHT:
        weighed = weighed / weight
    y = tl.sum(turn * weighed[None, :], 1)
    largest, y1, y2, y3 = 1e-30, y, y, y
    if PLANES:
        LAGS: tl.constexpr = len(FILTERS) // PLANES
        if LAGS > 1:
            y1 = tl.gather(y, (channel + 1) % D, 0)
        if LAGS > 2:
            y2 = tl.gather(y, (channel + 2) % D, 0)
        if LAGS > 3:
            y3 = tl.gather(y, (channel + 3) % D, 0)
        for plane in tl.static_range(PLANES):
            z = _of_plane(y, y1, y2, y3, plane, LAGS, FILTERS)
            largest = tl.maximum(largest, tl.max(tl.abs(z), 0))
    else:
        largest = tl.maximum(tl.max(tl.abs(y), 0), 1e-30)
    if CHAINED:
        gdc_launch_dependents()
    at = 2 * local
    total = 0
    for plane in tl.static_range(PLANES if PLANES else 1):
        z = y
        if PLANES:
            z = _of_plane(y, y1, y2, y3, plane, LAGS, FILTERS)
        n = tl.floor(z * (MOST / largest) + 0.5).to(tl.int32)
        high = (n + 128) >> 8
        to = q_ptr + ((block * (PLANES if PLANES else 1) + plane) * (2 * R) + at) * P + channel
        tl.store(to, high.to(tl.int8))
        tl.store(to + P, (n - 256 * high).to(tl.int8))
        total += tl.sum(n, 0)
    tl.store(start_ptr + block * 2 * R + at, 0)
    tl.store(start_ptr + block * 2 * R + at + 1, total >> 1)  # a level is 2 * b + 1
    tl.store(factor_ptr + block * R + local, 2.0 * largest / MOST * scale * unit)
    bias = 0.0
    if HAS_MEAN:
        bias = tl.sum(x * mean, 0) * scale
    tl.store(bias_ptr + block * R + local, bias)


_VARYING = [
    "rows",
    "queries",
    "blocks",
    "kv_heads",
    "first_tokens",
    "recent_tokens",
    "first_tiles",
    "tiles",
    "hidden",
    "first_table_row",
    "recent_table_row",
]
"""Arguments whose values do not lead to a new compilation."""


@triton.jit(do_not_specialize=_VARYING)
def prepare_kernel(
    query_ptr,
    weight_ptr,
    mean_ptr,
    halves_ptr,
    q_ptr,
    factor_ptr,
    start_ptr,
    bias_ptr,
    first_k_ptr,
    first_v_ptr,
    recent_k_ptr,
    recent_v_ptr,
    first_used_ptr,
    recent_used_ptr,
    first_starts_ptr,
    recent_starts_ptr,
    first_table_ptr,
    recent_table_ptr,
    slots_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    scale,
    unit,
    turn_factor,
    rows,
    queries,
    blocks,
    kv_heads,
    first_tokens,
    recent_tokens,
    first_tiles,
    tiles,
    hidden,
    first_table_row,
    recent_table_row,
    first_k_page,
    first_k_head,
    first_v_page,
    first_v_head,
    recent_k_page,
    recent_k_head,
    recent_v_page,
    recent_v_head,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    HALVES: tl.constexpr,
    PLANES: tl.constexpr,
    FILTERS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    FIRST_USED: tl.constexpr,
    RECENT_USED: tl.constexpr,
    FIRST_STARTS: tl.constexpr,
    RECENT_STARTS: tl.constexpr,
    FIRST_PAGE: tl.constexpr,
    RECENT_PAGE: tl.constexpr,
    SHARED: tl.constexpr,
    SLOTS: tl.constexpr,
    PLAIN: tl.constexpr,
    CHAINED: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Prepare one row of queries (axis 0 below R), or attend one tile of 16-bit tokens (axis 0 from R on).

    Axis 1 is a (batch, KV head, block of R rows), N in all.

    Read for the queries: query [BH, rows, D]; weight and mean [BH, D] of the channel transform, if HAS_WEIGHT
    and HAS_MEAN; halves [HALVES, P, P] float16, P = `padded(D)`, the rotation without turn_factor; scale, the
    factor on q.k in units of log 2; unit, of the key codebook; FILTERS, the taps of keys in PLANES bit
    planes, plane by plane. Written: q [N, 2R, P] int8, or [N, PLANES, 2R, P] where PLANES is not 0, the high
    part of row r at 2 r and the low part at 2 r + 1; factor [N, R], which undoes the scaling of q and the
    levels' unit; start [N, 2R] int32, what a sum over bytes b lacks for levels 2 * b + 1; bias [N, R], q .
    mean.

    Read for the 16-bit tokens: first and recent keys [BH, tokens, D] and values [BH, tokens, DV], contiguous,
    before and after the packed tokens; used [BH] int32, tokens in use, and starts [BH] int32, the first of
    them, each where its constant is set; first_tiles of `tiles` are before; query token i does not see the
    last hidden - i tokens; softcap in units of log 2, or 0. Written: o [N, tiles, R, DV], DV `padded`, m
    and l [N, R, tiles] float32.

    FIRST_PAGE, RECENT_PAGE: tokens of a page where keys and values are pools of pages with the strides *_page
    from page to page and *_head from head to head, and token t of batch entry b is in page first_table[b, t
    // FIRST_PAGE], first_table [B, first_table_row] int32; both are 0 where there are no tables.

    SHARED: weight and mean are [Hkv, D], for every batch entry.

    SLOTS: weight, mean, keys and values are [slots * Hkv, ...], and slots [B] int64 names the slot of each
    batch entry. PLAIN: compute in float32. CHAINED: the next kernel may start once all programs have loaded
    what they need; it waits for their results itself. ALONE: axis 0 has the tiles only, and queries are not
    prepared.
    """
    program, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if ALONE:
        program += R
    head, skipped = block // blocks, block % blocks * R
    own = head
    if SLOTS:
        own = tl.load(slots_ptr + head // kv_heads) * kv_heads + head % kv_heads
    if program < R:
        if not ALONE and skipped + program < rows:
            _prepare(
                query_ptr,
                weight_ptr,
                mean_ptr,
                halves_ptr,
                q_ptr,
                factor_ptr,
                start_ptr,
                bias_ptr,
                scale,
                unit,
                turn_factor,
                rows,
                block,
                head,
                head % kv_heads if SHARED else own,
                program,
                skipped + program,
                D,
                R,
                HALVES,
                PLANES,
                FILTERS,
                HAS_WEIGHT,
                HAS_MEAN,
                CHAINED,
            )
    else:
        tile = program - R
        row, value, token = tl.arange(0, R), tl.arange(0, padded(DV))[:, None], tl.arange(0, TILE)
        if tile < first_tiles:
            from_token, begin, end, unseen = tile * TILE, 0, first_tokens, 0
            if FIRST_PAGE:
                k_ptr = first_k_ptr + head % kv_heads * first_k_head
                v_ptr = first_v_ptr + head % kv_heads * first_v_head
                k_page, v_page = first_k_page, first_v_page
                page_table_ptr = first_table_ptr + head // kv_heads * first_table_row
                page, inside = (from_token + token) // FIRST_PAGE, (from_token + token) % FIRST_PAGE
            else:
                k_ptr, v_ptr = first_k_ptr + own * first_tokens * D, first_v_ptr + own * first_tokens * DV
            if FIRST_STARTS:
                begin = tl.load(first_starts_ptr + head)
            if FIRST_USED:
                end = tl.minimum(end, begin + tl.load(first_used_ptr + head))
        else:
            from_token, begin, end, unseen = (tile - first_tiles) * TILE, 0, recent_tokens, hidden
            if RECENT_PAGE:
                k_ptr = recent_k_ptr + head % kv_heads * recent_k_head
                v_ptr = recent_v_ptr + head % kv_heads * recent_v_head
                k_page, v_page = recent_k_page, recent_v_page
                page_table_ptr = recent_table_ptr + head // kv_heads * recent_table_row
                page, inside = (from_token + token) // RECENT_PAGE, (from_token + token) % RECENT_PAGE
            else:
                k_ptr, v_ptr = recent_k_ptr + own * recent_tokens * D, recent_v_ptr + own * recent_tokens * DV
            if RECENT_STARTS:
                begin = tl.load(recent_starts_ptr + head)
            if RECENT_USED:
                end = tl.minimum(end, begin + tl.load(recent_used_ptr + head))
        m, total = tl.full([R], -1e30, tl.float32), tl.zeros([R], tl.float32)
        out = tl.zeros([padded(DV), R], tl.float32)
        newest = end - tl.maximum(unseen - queries + 1, 0)  # what no query sees is not read
        if (from_token < newest) & (from_token + TILE > begin):
            if FIRST_PAGE:
                live = (from_token + token >= begin) & (from_token + token < end)
                k, v = load_paged_tile(
                    k_ptr, v_ptr, page_table_ptr, page, inside, live, k_page, v_page, D, DV, PLAIN
                )
            else:
                k, v = load_tile(k_ptr, v_ptr, from_token, begin, end, D, DV, TILE, PLAIN)
            q = load_queries(query_ptr, head, skipped, rows, D, R, PLAIN)  # last: they go by shared memory
            m, total, out = attend_tile(
                q,
                (skipped + row) % queries,
                k,
                v,
                from_token,
                begin,
                end,
                unseen,
                scale,
                softcap,
                DV,
                R,
                TILE,
                CHAINED,
            )
        slot = block * tiles + tile
        kept = skipped + row < rows
        to = o_ptr + (slot * R + row[None, :]) * padded(DV) + value
        tl.store(to, out, mask=kept[None, :])
        at = (block * R + row) * tiles + tile
        tl.store(m_ptr + at, m)
        tl.store(l_ptr + at, total)
