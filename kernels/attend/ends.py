"""What goes around the split kernel (Triton): preparing queries and the 16-bit tokens, and joining it all."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantpress.kernels.attend.dense import attend_tile, load_queries, load_tile

LOG2_E = tl.constexpr(1.4426950408889634)
TILES = tl.constexpr(16)
MOST = tl.constexpr(32512.0)
"""Query coordinates are counted in units of their largest over 127 * 256: the high byte stays below 128."""


@triton.jit
def _rotation(halves_ptr, C: tl.constexpr, HALVES: tl.constexpr):
    """A rotation [C, C] but for its factor, from its float16 halves [HALVES, C, C], rows in code space."""
    channel = tl.arange(0, C)
    at = halves_ptr + channel[:, None] * C + channel[None, :]
    turn = tl.load(at).to(tl.float32)
    if HALVES == 2:
        turn += tl.load(at + C * C).to(tl.float32)
    return turn


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
    HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One row to code space, in whole numbers n = 256 * high + low of 16 bits.

    Everything is loaded before the first sum, which it would wait behind, and before the next kernel starts,
    whose first loads are of several MB.
    """
    channel = tl.arange(0, D)
    turn = _rotation(halves_ptr, D, HALVES)
    x = tl.load(query_ptr + (head * rows + row) * D + channel).to(tl.float32)
    if HAS_MEAN:
        mean = tl.load(mean_ptr + own * D + channel)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + own * D + channel)
    weighed = x * turn_factor
    if HAS_WEIGHT:
        weighed = weighed / weight
    y = tl.sum(turn * weighed[None, :], 1)
    largest = tl.maximum(tl.max(tl.abs(y), 0), 1e-30)
    if CHAINED:
        gdc_launch_dependents()
    n = tl.floor(y * (MOST / largest) + 0.5).to(tl.int32)
    high = (n + 128) >> 8
    at = block * 2 * R + local // 8 * 16 + local % 8
    tl.store(q_ptr + at * D + channel, high.to(tl.int8))
    tl.store(q_ptr + (at + 8) * D + channel, (n - 256 * high).to(tl.int8))
    tl.store(start_ptr + at, 0)
    tl.store(start_ptr + at + 8, tl.sum(n, 0) >> 1)  # a level is 2 * b + 1
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
]
"""Numbers for which no kernel is compiled anew."""


@triton.jit(do_not_specialize=_VARYING)
def first_kernel(
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
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    FIRST_USED: tl.constexpr,
    RECENT_USED: tl.constexpr,
    FIRST_STARTS: tl.constexpr,
    RECENT_STARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    PLAIN: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Prepare queries (axis 0 below R: one row each) and attend 16-bit tokens (beyond: one tile each).

    Axis 1 is a (batch, KV head, block of R rows), N in all. query [BH, rows, D]; weight and mean [BH, D];
    halves [HALVES, D, D] float16 of the rotation, times turn_factor; q [N, 2R, D] int8, row r at 16 * (r //
    8) + r % 8 and, its low part, 8 rows later; factor [N, R] undoes their scaling and the levels' unit; start
    [N, 2R] int32 is what a sum over bytes b lacks for levels 2 * b + 1; bias [N, R] is q . mean. first and
    recent keys and values [BH, tokens, D] contiguous; o [N, tiles, R, DV], m and l [N, R, tiles] float32; the
    two used and starts [BH] int32, number of tokens in use and the first of them, count where their constant
    says so. SLOTS: weight, mean, keys and values are [slots * Hkv, ...], and slots [B] int64 says whose those
    of each batch entry are. CHAINED: the next kernel starts when all programs have loaded what they need, and
    waits by itself.
    """
    place, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, skipped = block // blocks, block % blocks * R
    own = head
    if SLOTS:
        own = tl.load(slots_ptr + head // kv_heads) * kv_heads + head % kv_heads
    if place < R:
        if skipped + place < rows:
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
                own,
                place,
                skipped + place,
                D,
                R,
                HALVES,
                HAS_WEIGHT,
                HAS_MEAN,
                CHAINED,
            )
    else:
        tile = place - R
        row, value = tl.arange(0, R), tl.arange(0, DV)
        if tile < first_tiles:
            from_token, begin, end, unseen = tile * TILE, 0, first_tokens, 0
            k_ptr, v_ptr = first_k_ptr + own * first_tokens * D, first_v_ptr + own * first_tokens * DV
            if FIRST_STARTS:
                begin = tl.load(first_starts_ptr + head)
            if FIRST_USED:
                end = tl.minimum(end, begin + tl.load(first_used_ptr + head))
        else:
            from_token, begin, end, unseen = (tile - first_tiles) * TILE, 0, recent_tokens, hidden
            k_ptr, v_ptr = recent_k_ptr + own * recent_tokens * D, recent_v_ptr + own * recent_tokens * DV
            if RECENT_STARTS:
                begin = tl.load(recent_starts_ptr + head)
            if RECENT_USED:
                end = tl.minimum(end, begin + tl.load(recent_used_ptr + head))
        m, total = tl.full([R], -1e30, tl.float32), tl.zeros([R], tl.float32)
        out = tl.zeros([DV, R], tl.float32)
        if (from_token < end) & (from_token + TILE > begin):
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
        tl.store(o_ptr + (slot * R + row[None, :]) * DV + value[:, None], out, mask=kept[None, :])
        at = (block * R + row) * tiles + tile
        tl.store(m_ptr + at, m)
        tl.store(l_ptr + at, total)


@triton.jit
def chunks_of_heads(
    used_ptr,
    starts_ptr,
    heads,
    pages,
    programs,
    HEADS: tl.constexpr,
    STARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """How a number of programs is shared out over heads by the pages that each has in use.

    Returns: the first page of each head in use, how many are [HEADS], and its chunks [HEADS], one to a
    program, among which its pages are shared out evenly. Heads follow each other. At most `programs` chunks,
    if that is more than `heads`.
    """
    head = tl.arange(0, HEADS)
    used = tl.load(used_ptr + head, mask=head < heads, other=0)
    start = 0 * used
    if STARTS:
        start = tl.load(starts_ptr + head, mask=head < heads, other=0)
    begin = start // TOKENS
    end = tl.minimum(start + used, pages * TOKENS)
    there = tl.where(used > 0, tl.cdiv(end, TOKENS) - begin, 0)
    size = tl.maximum(tl.cdiv(tl.sum(there, 0), programs - heads), 1)
    return begin, there, tl.cdiv(there, size)


@triton.jit(do_not_specialize=["heads", "pages", "programs"])
def share_kernel(
    used_ptr,
    table_ptr,
    programs_ptr,
    heads_ptr,
    heads,
    pages,
    programs,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Write down the shares of SIZE programs: see `quantpress.kernels.attend.schedule`.

    used [heads] int32; table [heads, pages] int32; programs [programs, 4] and heads [heads, 2] int32.
    """
    part = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    head = tl.arange(0, HEADS)
    _, there, chunks = chunks_of_heads(used_ptr, used_ptr, heads, pages, programs, HEADS, False, 128)
    ends = tl.cumsum(chunks, 0)
    begins = ends - chunks
    own = (begins[None, :] <= part[:, None]) & (part[:, None] < ends[None, :])
    mine = tl.sum(tl.where(own, head[None, :], 0), 1)
    local = part - tl.sum(tl.where(own, begins[None, :], 0), 1)
    parts = tl.maximum(tl.sum(tl.where(own, chunks[None, :], 0), 1), 1)
    held = tl.sum(tl.where(own, there[None, :], 0), 1)  # 0 for programs that are left over
    first, last = local * held // parts, (local + 1) * held // parts
    live = part < programs
    place = tl.load(table_ptr + mine.to(tl.int64) * pages + tl.minimum(first, pages - 1), mask=live, other=0)
    at = programs_ptr + part * 4
    tl.store(at, mine, mask=live)
    tl.store(at + 1, first, mask=live)
    tl.store(at + 2, last, mask=live)
    tl.store(at + 3, place, mask=live)
    if tl.program_id(0) == 0:
        tl.store(heads_ptr + head * 2, begins, mask=head < heads)
        tl.store(heads_ptr + head * 2 + 1, ends, mask=head < heads)


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
):
    """Partial sums of one row from `start` of `count` on, up to `end`: o [SIZE, DV], m and l [SIZE]."""
    split = start + tl.arange(0, SIZE)
    live = split < end
    slot = (block * count + split) * R + local
    o = tl.load(o_ptr + slot[:, None] * DV + tl.arange(0, DV)[None, :], mask=live[:, None], other=0.0)
    at = (block * R + local) * count + split
    m = tl.load(m_ptr + at, mask=live, other=-1e30)
    return o, m, tl.load(l_ptr + at, mask=live, other=0.0)


@triton.jit
def _join(m, total, y, part_o, part_m, part_l):
    """Take partial sums into m, total [1] and y [DV]."""
    new = tl.maximum(m, tl.max(part_m, 0))
    decay, weight = tl.exp2(m - new), tl.exp2(part_m - new)
    y = y * decay + tl.sum(part_o * weight[:, None], 0)
    return new, total * decay + tl.sum(part_l * weight, 0), y


_NUMBERS = ["splits", "tiles", "rows", "queries", "group", "kv_heads", "blocks", "heads", "pages"]


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
    used_ptr,
    starts_ptr,
    shares_ptr,
    splits,
    tiles,
    rows,
    queries,
    group,
    kv_heads,
    blocks,
    heads,
    pages,
    unit,
    DV: tl.constexpr,
    R: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    STARTS: tl.constexpr,
    SHARED: tl.constexpr,
    EACH: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Join the splits of EACH rows of one (batch, KV head), rotate back once, join the 16-bit tokens.

    o [N, splits, R, DV], m and l [N, R, splits]; dense_o, dense_m, dense_l the same with tiles; sinks [Hkv *
    G] logits; rotation [DV, DV]; out [BH, rows, DV]. Where HEADS is not 0,
    o, m and l are [blocks, splits, ...], the splits shared out over the heads by `chunks_of_heads`, or, if
    SHARED, as shares [BH, 2] int32 has it.
    """
    head = tl.program_id(1).to(tl.int64)
    begin, end = 0, splits
    if SHARED:
        begin = tl.load(shares_ptr + head * 2)
        end = tl.load(shares_ptr + head * 2 + 1)
    elif HEADS:
        _, _, chunks = chunks_of_heads(used_ptr, starts_ptr, heads, pages, splits, HEADS, STARTS, 128)
        index = tl.arange(0, HEADS)
        begin = tl.sum(tl.where(index < head, chunks, 0), 0)
        end = begin + tl.sum(tl.where(index == head, chunks, 0), 0)
    value = tl.arange(0, DV)
    turn = tl.load(rotation_ptr + value[:, None] * DV + value[None, :])  # float32: to convert it takes 0.5 us
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
        y = tl.zeros([DV], tl.float32)
        o, ms, ls = _load(o_ptr, m_ptr, l_ptr, begin, end, splits, holder, local, DV, R, SIZE)
        dense_o, dense_ms, dense_ls = _load(
            dense_o_ptr, dense_m_ptr, dense_l_ptr, 0, tiles, tiles, block, local, DV, R, TILES
        )
        m, total, y = _join(m, total, y, o, ms, ls)
        for start in range(begin + SIZE, end, SIZE):
            o, ms, ls = _load(o_ptr, m_ptr, l_ptr, start, end, splits, holder, local, DV, R, SIZE)
            m, total, y = _join(m, total, y, o, ms, ls)
        turned = tl.sum(turn * (y * unit)[:, None], 0)
        m, total, turned = _join(m, total, turned, dense_o, dense_ms, dense_ls)
        for start in range(TILES, tiles, TILES):
            dense_o, dense_ms, dense_ls = _load(
                dense_o_ptr, dense_m_ptr, dense_l_ptr, start, tiles, tiles, block, local, DV, R, TILES
            )
            m, total, turned = _join(m, total, turned, dense_o, dense_ms, dense_ls)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head % kv_heads * group + row // queries).to(tl.float32) * LOG2_E
            new = tl.maximum(m, sink)
            decay = tl.exp2(m - new)
            turned = turned * decay
            total = total * decay + tl.exp2(sink - new)
        total = tl.where(total == 0, 1.0, total)  # nothing in use
        tl.store(out_ptr + (head * rows + row) * DV + value, turned / total)
