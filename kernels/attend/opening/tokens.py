"""16-bit tokens, attended by single warps of the split kernel (Gluon).

Products are `mma.m16n8k16`, tokens or channels by columns: the query and nothing, and then the high part of a
weight and its residual in 16 bits, of one row each. As with packed words, rows and columns of the products
are numbered so that a lane loads 16 bytes of neighbouring channels at a time, and uses them itself:

    K operand    column 32 * v + 16 * h + 8 * b + 2 * t + i: channel 32 * v + 8 * t + 4 * h + 2 * b + i
    V operand    row 64 * c + 16 * j + 8 * b + g: channel 64 * c + 8 * g + 2 * j + b

for lane 4 * g + t.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from quantpress.kernels.attend.tiles import exp2, high_and_low, of_rows


@gluon.constexpr_function
def _vectors_layout(GROUPS, COLUMNS):
    """The layout [GROUPS, COLUMNS, 32 lanes, 8 channels] in which each lane holds its own vectors."""
    return gl.BlockedLayout([GROUPS, COLUMNS, 1, 8], [1, 1, 32, 1], [1, 1, 1, 1], [3, 2, 1, 0])


@gluon.jit
def _vectors(
    ptr,
    token,
    channel,
    start,
    begin,
    end,
    page_table_ptr,
    page_stride,
    before,
    C: gl.constexpr,
    FIRST_PAGE: gl.constexpr,
    RECENT_PAGE: gl.constexpr,
):
    """Vectors [GROUPS, COLUMNS, 32, 8] of tokens start + token [GROUPS, 32]; zero if not in use."""
    at = start + token
    live = (at >= begin) & (at < end)
    if FIRST_PAGE:
        page = gl.where(before, at // FIRST_PAGE, at // RECENT_PAGE)
        pool_row = gl.load(page_table_ptr + page, mask=live, other=0).to(gl.int64)
        offset = pool_row * page_stride + gl.where(before, at % FIRST_PAGE, at % RECENT_PAGE) * C
    else:
        offset = at * C
    offsets = offset[:, None, :, None] + channel[None, :, :, :]
    return gl.load(ptr + offsets, mask=live[:, None, :, None], other=0.0)


@gluon.jit
def _tile(
    k_ptr,
    v_ptr,
    page_table_ptr,
    k_page,
    v_page,
    start,
    begin,
    end,
    before,
    D: gl.constexpr,
    DV: gl.constexpr,
    TILE: gl.constexpr,
    FIRST_PAGE: gl.constexpr,
    RECENT_PAGE: gl.constexpr,
    mma: gl.constexpr,
):
    """Keys [TILE, D] and values [DV, TILE] as left operands, of tokens `start` on; see the module."""
    KEYS: gl.constexpr = _vectors_layout(TILE // 8, D // 32)
    VALUES: gl.constexpr = _vectors_layout(TILE // 4, DV // 64)
    group = gl.arange(0, TILE // 8, layout=gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, KEYS))))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, KEYS))))
    token = group[:, None] * 8 + lane[None, :] // 4
    column = gl.arange(0, D // 32, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(0, KEYS))))
    own = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(0, KEYS))))
    each = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(0, KEYS))))
    channel = column[:, None, None] * 32 + own[None, :, None] % 4 * 8 + each[None, None, :]
    k = _vectors(
        k_ptr, token, channel, start, begin, end, page_table_ptr, k_page, before, D, FIRST_PAGE, RECENT_PAGE
    )
    group = gl.arange(0, TILE // 4, layout=gl.SliceLayout(1, gl.SliceLayout(1, gl.SliceLayout(3, VALUES))))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, VALUES))))
    token = group[:, None] // 2 * 8 + lane[None, :] % 4 * 2 + group[:, None] % 2
    column = gl.arange(0, DV // 64, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(0, VALUES))))
    own = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(0, VALUES))))
    each = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(0, VALUES))))
    channel = column[:, None, None] * 64 + own[None, :, None] // 4 * 8 + each[None, None, :]
    v = _vectors(
        v_ptr, token, channel, start, begin, end, page_table_ptr, v_page, before, DV, FIRST_PAGE, RECENT_PAGE
    )
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    k = k.reshape([TILE // 16, 2, D // 32, 8, 4, 2, 2, 2])  # x b v | g t | h e i
    k = k.permute([0, 1, 3, 2, 5, 6, 4, 7]).reshape([TILE, D])
    v = v.reshape([TILE // 16, 2, 2, DV // 64, 8, 4, 4, 2])  # x e i c | g t | j b
    v = v.permute([3, 6, 7, 4, 0, 1, 5, 2]).reshape([DV, TILE])
    return gl.convert_layout(k, left, assert_trivial=True), gl.convert_layout(v, left, assert_trivial=True)


@gluon.jit
def _queries(query_ptr, head, skipped, rows, D: gl.constexpr, ROWS: gl.constexpr, mma: gl.constexpr):
    """Rows `skipped` on of a head's queries as the right operand [D, 2 ROWS], columns 2 r, and zeros."""
    layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    at = gl.arange(0, D, layout=gl.SliceLayout(1, layout))
    channel = at // 32 * 32 + at // 2 % 4 * 8 + at // 8 % 4 * 2 + at % 2
    column = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(0, layout))
    row = skipped + column // 2
    live = (column % 2 == 0) & (row < rows)
    return gl.load(
        query_ptr + (head * rows + row)[None, :] * D + channel[:, None], mask=live[None, :], other=0.0
    )


@gluon.jit
def _attended(
    q,
    k,
    v,
    start,
    query,
    begin,
    end,
    hidden,
    scale,
    softcap,
    m,
    total,
    acc,
    TILE: gl.constexpr,
    DV: gl.constexpr,
    ROWS: gl.constexpr,
    CAPPED: gl.constexpr,
    mma: gl.constexpr,
):
    """Sums m, total [ROWS] and acc [DV, ROWS] with a tile added, as `attend_tile` of `dense` computes it."""
    s, nothing = high_and_low(mma_v2(k, q, gl.full([TILE, 2 * ROWS], 0.0, gl.float32, mma)), TILE, ROWS)
    s = (s + nothing) * scale
    if CAPPED:
        x = s / softcap
        e = gl.exp2(-2.8853900817779268 * gl.abs(x))
        x_cap = (1.0 - e) / (1.0 + e)
        s = softcap * gl.where(x < 0, -x_cap, x_cap)
    at = start + gl.arange(0, TILE, layout=gl.SliceLayout(1, s.type.layout))
    newest = end - gl.maximum(hidden - query, 0)
    s = gl.where((at >= begin)[:, None] & (at[:, None] < newest[None, :]), s, float("-inf"))
    new = gl.maximum(m, gl.maximum(gl.max(s, 0), -1e30))
    decay = exp2(m - new)
    p = exp2(s - new[None, :])
    total = total * decay + gl.sum(p, 0)
    high = p.to(v.dtype)
    both = gl.join(high, (p - high.to(gl.float32)).to(v.dtype)).reshape([TILE, 2 * ROWS])
    weights = gl.convert_layout(both, gl.DotOperandLayout(1, mma, 2))
    o, rest = high_and_low(mma_v2(v, weights, gl.full([DV, 2 * ROWS], 0.0, gl.float32, mma)), DV, ROWS)
    return new, total, acc * of_rows(decay, acc) + (o + rest)


@gluon.jit
def attend_tokens(
    query_ptr,
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
    o_ptr,
    m_ptr,
    l_ptr,
    head,
    block,
    own,
    kv_heads,
    skipped,
    part,
    parts,
    slots,
    rows,
    queries,
    first_tokens,
    recent_tokens,
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
    scale,
    softcap,
    mma: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    R: gl.constexpr,
    ROWS: gl.constexpr,
    TILE: gl.constexpr,
    FIRST_USED: gl.constexpr,
    RECENT_USED: gl.constexpr,
    FIRST_STARTS: gl.constexpr,
    RECENT_STARTS: gl.constexpr,
    FIRST_PAGE: gl.constexpr,
    RECENT_PAGE: gl.constexpr,
    CAPPED: gl.constexpr,
):
    """Sums over tiles part, part + parts, ... of a head's 16-bit tokens, those before packed tokens first.

    Pointers, numbers and constants are those of `prepare_kernel`, tiles have TILE tokens. head: which of BH;
    block: of N; own: the head whose tokens are read, where there is no table; skipped: rows in front of the
    block's. Written: o [N, slots, R, DV], m and l [N, R, slots] at slot `part`, o only for rows of the head.
    """
    q = _queries(query_ptr, head, skipped, rows, D, ROWS, mma)
    blank, _ = high_and_low(gl.full([TILE, 2 * ROWS], 0.0, gl.float32, mma), TILE, ROWS)
    by_row: gl.constexpr = gl.SliceLayout(0, blank.type.layout)
    row = gl.arange(0, ROWS, layout=by_row)
    query = (skipped + row) % queries
    m = gl.full([ROWS], -1e30, gl.float32, by_row)
    total = gl.full([ROWS], 0.0, gl.float32, by_row)
    acc, _ = high_and_low(gl.full([DV, 2 * ROWS], 0.0, gl.float32, mma), DV, ROWS)
    entry, kv_head = head // kv_heads, head % kv_heads
    first_tiles = (first_tokens + TILE - 1) // TILE
    tiles = first_tiles + (recent_tokens + TILE - 1) // TILE
    for tile in range(part, tiles, parts):
        before = tile < first_tiles
        if before:
            start, begin, end, unseen = tile * TILE, 0, first_tokens, 0
            if FIRST_PAGE:
                k_ptr, v_ptr = first_k_ptr + kv_head * first_k_head, first_v_ptr + kv_head * first_v_head
            else:
                k_ptr, v_ptr = first_k_ptr + own * first_tokens * D, first_v_ptr + own * first_tokens * DV
            if FIRST_STARTS:
                begin = gl.load(first_starts_ptr + head)
            if FIRST_USED:
                end = gl.minimum(end, begin + gl.load(first_used_ptr + head))
        else:
            start, begin, end, unseen = (tile - first_tiles) * TILE, 0, recent_tokens, hidden
            if RECENT_PAGE:
                k_ptr, v_ptr = recent_k_ptr + kv_head * recent_k_head, recent_v_ptr + kv_head * recent_v_head
            else:
                k_ptr, v_ptr = recent_k_ptr + own * recent_tokens * D, recent_v_ptr + own * recent_tokens * DV
            if RECENT_STARTS:
                begin = gl.load(recent_starts_ptr + head)
            if RECENT_USED:
                end = gl.minimum(end, begin + gl.load(recent_used_ptr + head))
        if FIRST_PAGE:
            k_page = gl.where(before, first_k_page, recent_k_page)
            v_page = gl.where(before, first_v_page, recent_v_page)
            table_ptr = first_table_ptr + entry * first_table_row
            if not before:
                table_ptr = recent_table_ptr + entry * recent_table_row
        else:
            k_page, v_page, table_ptr = 0, 0, k_ptr
        newest = end - gl.maximum(unseen - queries + 1, 0)  # what no query sees is not read
        if (start < newest) & (start + TILE > begin):
            k, v = _tile(
                k_ptr,
                v_ptr,
                table_ptr,
                k_page,
                v_page,
                start,
                begin,
                end,
                before,
                D,
                DV,
                TILE,
                FIRST_PAGE,
                RECENT_PAGE,
                mma,
            )
            m, total, acc = _attended(
                q,
                k,
                v,
                start,
                query,
                begin,
                end,
                unseen,
                scale,
                softcap,
                m,
                total,
                acc,
                TILE,
                DV,
                ROWS,
                CAPPED,
                mma,
            )
    written: gl.constexpr = gl.BlockedLayout(
        [1, 4], [32 * 4 // DV, DV // 4] if DV < 128 else [1, 32], [1, 1], [1, 0]
    )
    out = acc.reshape([DV // 64, 4, 2, 8, ROWS]).permute([4, 0, 3, 1, 2]).reshape([ROWS, DV])  # r | c g j b
    out_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, written))
    value = gl.arange(0, DV, layout=gl.SliceLayout(0, written))
    to = ((block * slots + part) * R + out_row[:, None]) * DV + value[None, :]
    gl.store(o_ptr + to, gl.convert_layout(out, written), mask=(skipped + out_row < rows)[:, None])
    at = (block * R + row) * slots + part
    gl.store(m_ptr + at, m)
    gl.store(l_ptr + at, total)
