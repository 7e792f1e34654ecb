"""Decode attention straight from the codes, split over the tokens of each KV head (Triton).

One program reads the packed tokens of one split of one KV head. For token t and row r (a query head of the
group and a query token), in code space and in units of log 2:

    s[t, r] = k_scale[t] * (k_level[t] . q[r]) * factor[r] + bias[r]
    p[t, r] = exp2(s[t, r] + log2 v_scale[t] - m[r]),      o[r] += sum_t p[t, r] v_level[t]
    l[r] += sum_t p[t, r] / v_scale[t]

Both products run on fp8 tensor cores: codebook levels are exact in e4m3, and queries and weights are split
into a high part and a residual times 16, which lie side by side as columns of one operand. Taking the value
scale into the exponent keeps every p at 1 or less, whatever the values' size.

Rows of the first product are tokens, rows of the second channels; a tile has 64 tokens: 64 of one page when
keys and values both have 4 bits, else 32 of each of two pages.
"""

import triton
import triton.language as tl

from quantpress.kernels.attend.dense import attend_tokens, tanh
from quantpress.kernels.attend.lookup import code_at, levels2, levels3, levels4

RESIDUAL = tl.constexpr(16.0)
PAGE_TOKENS = tl.constexpr(128)
_WEIGHT = tl.constexpr(256.0)  # p is at most 1, e4m3 goes to 448
_LEAST_SCALE = tl.constexpr(2.0**-24)  # the least float16: a zero value scale would make log2 infinite


@triton.jit
def _scores(k, q, factor, bias, ks, live, softcap, R: tl.constexpr, PLAIN: tl.constexpr, ACC: tl.constexpr):
    """k [64, D] levels, q [D, 2R] -> [64, R] float32 in units of log 2, -inf where not live."""
    if PLAIN:  # noqa: SIM108 (a compile-time branch)
        both = tl.dot(k, q, input_precision="ieee")
    else:
        both = tl.dot(k, q, max_num_imprecise_acc=ACC)
    column = tl.arange(0, 2 * R)
    both = both * tl.where(column < R, 1.0, 1.0 / RESIDUAL)[None, :]
    s = tl.sum(tl.reshape(both, [64, 2, R]), 1) * factor[None, :] * ks[:, None] + bias[None, :]
    if softcap > 0:
        s = softcap * tanh(s / softcap)
    return tl.where(live[:, None], s, float("-inf"))


@triton.jit
def _add(acc, v, p, R: tl.constexpr, PLAIN: tl.constexpr, ACC: tl.constexpr):
    """acc [D, 2R] += v [D, 64] levels . p [64, R]."""
    twice = tl.reshape(tl.broadcast_to((p * _WEIGHT)[:, None, :], [64, 2, R]), [64, 2 * R])
    column = tl.arange(0, 2 * R)[None, :]
    if PLAIN:
        acc = tl.dot(v, tl.where(column < R, twice, 0.0), acc, input_precision="ieee")
    else:
        high = twice.to(tl.float8e4nv).to(tl.float32)
        split = tl.where(column < R, high, (twice - high) * RESIDUAL).to(tl.float8e4nv)
        acc = tl.dot(v, split, acc, max_num_imprecise_acc=ACC)
    return acc


@triton.jit
def _tile(quarter: tl.constexpr, PAIRS: tl.constexpr):
    """Page (0 or 1) and token in the page of each of a tile's 64 tokens."""
    row = tl.arange(0, 64)
    if PAIRS:
        which = row // 32
        token = quarter * 32 + row % 32
    else:
        which = 0 * row
        token = quarter * 64 + row
    return which, token


@triton.jit
def _scale(scale_ptr, stride, page, used, quarter: tl.constexpr, PAIRS: tl.constexpr):
    """Scales [64] float32 of a tile, and which of its tokens are in use."""
    which, token = _tile(quarter, PAIRS)
    live = (page + which) * PAGE_TOKENS + token < used
    return tl.load(scale_ptr + (page + which) * stride + token, mask=live, other=0.0).to(tl.float32), live


@triton.jit
def _plain_levels(
    codes_ptr,
    levels_ptr,
    stride,
    page,
    pages,
    quarter: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Levels of a tile as float32, [64, D] or for values [D, 64], without assembly."""
    which, token = _tile(quarter, PAIRS)
    channel = tl.arange(0, D)
    start = (page + which) * stride
    live = page + which < pages
    if VALUES:
        code = code_at(
            codes_ptr + start[None, :], token[None, :], channel[:, None], D, BITS, True, live[None, :]
        )
    else:
        code = code_at(
            codes_ptr + start[:, None], token[:, None], channel[None, :], D, BITS, False, live[:, None]
        )
    return tl.load(levels_ptr + code)


@triton.jit
def _load(
    codes_ptr,
    stride,
    page,
    pages,
    first: tl.constexpr,
    ROWS: tl.constexpr,
    PERIOD: tl.constexpr,
    D: tl.constexpr,
    VALUES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """64 packed rows of keys [64, D] or columns of values [D, 64], `PERIOD` of each page, repeated."""
    row = tl.arange(0, 64)
    channel = tl.arange(0, D)
    if PAIRS:
        which = row // 32
        inside = first + row % PERIOD
    else:
        which = 0 * row
        inside = row
    start = (page + which) * stride
    live = page + which < pages
    if VALUES:
        at = codes_ptr + start[None, :] + channel[:, None] * ROWS + inside[None, :]
        tile = tl.load(at, mask=live[None, :], other=0)
    else:
        at = codes_ptr + start[:, None] + inside[:, None] * D + channel[None, :]
        tile = tl.load(at, mask=live[:, None], other=0)
    return tile


@triton.jit
def _quarters(
    codes_ptr,
    levels_ptr,
    stride,
    page,
    pages,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ASM: tl.constexpr,
    VALUES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The four tiles of two pages, 32 tokens of each: levels [64, D], of values [D, 64]."""
    if PLAIN:
        a = _plain_levels(codes_ptr, levels_ptr, stride, page, pages, 0, D, BITS, VALUES, True)
        b = _plain_levels(codes_ptr, levels_ptr, stride, page, pages, 1, D, BITS, VALUES, True)
        c = _plain_levels(codes_ptr, levels_ptr, stride, page, pages, 2, D, BITS, VALUES, True)
        d = _plain_levels(codes_ptr, levels_ptr, stride, page, pages, 3, D, BITS, VALUES, True)
    elif BITS == 4:
        a, c = levels4(_load(codes_ptr, stride, page, pages, 0, 64, 32, D, VALUES, True), ASM)
        b, d = levels4(_load(codes_ptr, stride, page, pages, 32, 64, 32, D, VALUES, True), ASM)
    elif BITS == 3:
        size = _load(codes_ptr, stride, page, pages, 0, 32, 32, D, VALUES, True)
        sign = _load(codes_ptr + 32 * D, stride, page, pages, 0, 16, 16, D, VALUES, True)
        odd = (0 - (tl.arange(0, 64) % 32 >= 16).to(tl.int32)).to(tl.uint8)
        if VALUES:  # noqa: SIM108 (a compile-time branch)
            odd = tl.broadcast_to(odd[None, :], [D, 64])
        else:
            odd = tl.broadcast_to(odd[:, None], [64, D])
        a, b, c, d = levels3(size, sign, odd, ASM)
    else:
        a, b, c, d = levels2(_load(codes_ptr, stride, page, pages, 0, 32, 32, D, VALUES, True), ASM)
    return a, b, c, d


@triton.jit
def _halves(
    codes_ptr,
    levels_ptr,
    stride,
    page,
    pages,
    D: tl.constexpr,
    ASM: tl.constexpr,
    VALUES: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """The two tiles of one page of 4 bits."""
    if PLAIN:
        a = _plain_levels(codes_ptr, levels_ptr, stride, page, pages, 0, D, 4, VALUES, False)
        b = _plain_levels(codes_ptr, levels_ptr, stride, page, pages, 1, D, 4, VALUES, False)
    else:
        a, b = levels4(_load(codes_ptr, stride, page, pages, 0, 64, 64, D, VALUES, False), ASM)
    return a, b


@triton.jit
def _attend_pages(
    q_ptr,
    factor_ptr,
    bias_ptr,
    k_ptr,
    ks_ptr,
    v_ptr,
    vs_ptr,
    k_levels_ptr,
    v_levels_ptr,
    first,
    last,
    pages,
    used,
    k_page,
    ks_page,
    v_page,
    vs_page,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_ASM: tl.constexpr,
    V_ASM: tl.constexpr,
    PLAIN: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
):
    """Running softmax over pages of one head, `used` tokens in use: m and total [R], acc [DV, 2R]."""
    PAIRS: tl.constexpr = K_BITS != 4 or V_BITS != 4
    STEP: tl.constexpr = 2 if PAIRS else 1
    column, row = tl.arange(0, 2 * R), tl.arange(0, R)
    channel = tl.arange(0, D)
    q = tl.load(q_ptr + column[None, :] * D + channel[:, None])
    factor = tl.load(factor_ptr + row)
    bias = tl.load(bias_ptr + row)
    m = tl.full([R], -1e30, tl.float32)
    total = tl.zeros([R], tl.float32)
    acc = tl.zeros([DV, 2 * R], tl.float32)
    for page in tl.range(first, last, STEP, num_stages=STAGES):
        if PAIRS:
            k0, k1, k2, k3 = _quarters(
                k_ptr, k_levels_ptr, k_page, page, pages, D, K_BITS, K_ASM, False, PLAIN
            )
            ks0, live0 = _scale(ks_ptr, ks_page, page, used, 0, True)
            ks1, live1 = _scale(ks_ptr, ks_page, page, used, 1, True)
            ks2, live2 = _scale(ks_ptr, ks_page, page, used, 2, True)
            ks3, live3 = _scale(ks_ptr, ks_page, page, used, 3, True)
            vs0, _ = _scale(vs_ptr, vs_page, page, used, 0, True)
            vs1, _ = _scale(vs_ptr, vs_page, page, used, 1, True)
            vs2, _ = _scale(vs_ptr, vs_page, page, used, 2, True)
            vs3, _ = _scale(vs_ptr, vs_page, page, used, 3, True)
            vs0, vs1 = tl.maximum(vs0, _LEAST_SCALE), tl.maximum(vs1, _LEAST_SCALE)
            vs2, vs3 = tl.maximum(vs2, _LEAST_SCALE), tl.maximum(vs3, _LEAST_SCALE)
            s0 = _scores(k0, q, factor, bias, ks0, live0, softcap, R, PLAIN, ACC) + tl.log2(vs0)[:, None]
            s1 = _scores(k1, q, factor, bias, ks1, live1, softcap, R, PLAIN, ACC) + tl.log2(vs1)[:, None]
            s2 = _scores(k2, q, factor, bias, ks2, live2, softcap, R, PLAIN, ACC) + tl.log2(vs2)[:, None]
            s3 = _scores(k3, q, factor, bias, ks3, live3, softcap, R, PLAIN, ACC) + tl.log2(vs3)[:, None]
            new = tl.maximum(m, tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0))
            p0, p1 = tl.exp2(s0 - new[None, :]), tl.exp2(s1 - new[None, :])
            p2, p3 = tl.exp2(s2 - new[None, :]), tl.exp2(s3 - new[None, :])
            here = p0 / vs0[:, None] + p1 / vs1[:, None] + p2 / vs2[:, None] + p3 / vs3[:, None]
        else:
            k0, k1 = _halves(k_ptr, k_levels_ptr, k_page, page, pages, D, K_ASM, False, PLAIN)
            ks0, live0 = _scale(ks_ptr, ks_page, page, used, 0, False)
            ks1, live1 = _scale(ks_ptr, ks_page, page, used, 1, False)
            vs0, _ = _scale(vs_ptr, vs_page, page, used, 0, False)
            vs1, _ = _scale(vs_ptr, vs_page, page, used, 1, False)
            vs0, vs1 = tl.maximum(vs0, _LEAST_SCALE), tl.maximum(vs1, _LEAST_SCALE)
            s0 = _scores(k0, q, factor, bias, ks0, live0, softcap, R, PLAIN, ACC) + tl.log2(vs0)[:, None]
            s1 = _scores(k1, q, factor, bias, ks1, live1, softcap, R, PLAIN, ACC) + tl.log2(vs1)[:, None]
            new = tl.maximum(m, tl.max(tl.maximum(s0, s1), 0))
            p0, p1 = tl.exp2(s0 - new[None, :]), tl.exp2(s1 - new[None, :])
            here = p0 / vs0[:, None] + p1 / vs1[:, None]
        decay = tl.exp2(m - new)
        m = new
        total = total * decay + tl.sum(here, 0)
        acc = acc * tl.reshape(tl.broadcast_to(decay[None, :], [2, R]), [2 * R])[None, :]
        if PAIRS:
            v0, v1, v2, v3 = _quarters(
                v_ptr, v_levels_ptr, v_page, page, pages, DV, V_BITS, V_ASM, True, PLAIN
            )
            acc = _add(acc, v0, p0, R, PLAIN, ACC)
            acc = _add(acc, v1, p1, R, PLAIN, ACC)
            acc = _add(acc, v2, p2, R, PLAIN, ACC)
            acc = _add(acc, v3, p3, R, PLAIN, ACC)
        else:
            v0, v1 = _halves(v_ptr, v_levels_ptr, v_page, page, pages, DV, V_ASM, True, PLAIN)
            acc = _add(acc, v0, p0, R, PLAIN, ACC)
            acc = _add(acc, v1, p1, R, PLAIN, ACC)
    acc = acc * tl.where(column < R, 1.0 / _WEIGHT, 1.0 / (_WEIGHT * RESIDUAL))[None, :]
    return m, total, acc


@triton.jit
def attend_split_kernel(
    q_ptr,
    factor_ptr,
    bias_ptr,
    k_ptr,
    ks_ptr,
    v_ptr,
    vs_ptr,
    k_levels_ptr,
    v_levels_ptr,
    query_ptr,
    first_k_ptr,
    first_v_ptr,
    recent_k_ptr,
    recent_v_ptr,
    used_ptr,
    first_used_ptr,
    recent_used_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    pages,
    per_split,
    splits,
    k_head,
    k_page,
    ks_head,
    ks_page,
    v_head,
    v_page,
    vs_head,
    vs_page,
    first_tokens,
    recent_tokens,
    hidden,
    rows,
    queries,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_ASM: tl.constexpr,
    V_ASM: tl.constexpr,
    PLAIN: tl.constexpr,
    STAGES: tl.constexpr,
    ACC: tl.constexpr,
    USED: tl.constexpr,
    FIRST_USED: tl.constexpr,
    RECENT_USED: tl.constexpr,
):
    """Partial softmax sums of one split (axis 0) of one (batch, KV head) (axis 1).

    Split `splits` is the 16-bit tokens. q [BH, 2R, D] e4m3 (PLAIN: float32), factor and bias [BH, R]; query
    [BH, rows, D]; first and recent keys and values [BH, tokens, D] contiguous; o [BH, S, R, DV], m and l
    [BH, S, R] float32, S the number of programs on axis 0; the three used [BH] int32, tokens in use, count
    where their constant says so.
    """
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, row, value = tl.arange(0, 2 * R), tl.arange(0, R), tl.arange(0, DV)
    if split < splits:
        first = split * per_split
        used = pages * PAGE_TOKENS
        if USED:
            used = tl.minimum(tl.load(used_ptr + head), used)
        there = tl.cdiv(used, PAGE_TOKENS)
        m, total, acc = _attend_pages(
            q_ptr + head * 2 * R * D,
            factor_ptr + head * R,
            bias_ptr + head * R,
            k_ptr + head * k_head,
            ks_ptr + head * ks_head,
            v_ptr + head * v_head,
            vs_ptr + head * vs_head,
            k_levels_ptr,
            v_levels_ptr,
            first,
            tl.minimum(first + per_split, there),
            there,
            used,
            k_page,
            ks_page,
            v_page,
            vs_page,
            softcap,
            D,
            DV,
            R,
            K_BITS,
            V_BITS,
            K_ASM,
            V_ASM,
            PLAIN,
            STAGES,
            ACC,
        )
    else:
        at = query_ptr + head * rows * D + column[None, :] * D + tl.arange(0, D)[:, None]
        q = tl.load(at, mask=column[None, :] < rows, other=0.0)
        if PLAIN:
            q = q.to(tl.float32)
        m = tl.full([R], -1e30, tl.float32)
        total = tl.zeros([R], tl.float32)
        acc = tl.zeros([DV, 2 * R], tl.float32)
        k = first_k_ptr + head * first_tokens * D
        v = first_v_ptr + head * first_tokens * DV
        used = first_tokens
        if FIRST_USED:
            used = tl.minimum(tl.load(first_used_ptr + head), used)
        m, total, acc = attend_tokens(
            q, k, v, used, 0, queries, scale, softcap, m, total, acc, D, DV, R, TILE, PLAIN
        )
        k = recent_k_ptr + head * recent_tokens * D
        v = recent_v_ptr + head * recent_tokens * DV
        used = recent_tokens
        if RECENT_USED:
            used = tl.minimum(tl.load(recent_used_ptr + head), used)
        m, total, acc = attend_tokens(
            q, k, v, used, hidden, queries, scale, softcap, m, total, acc, D, DV, R, TILE, PLAIN
        )
    out = tl.sum(tl.reshape(acc, [DV, 2, R]), 1)
    slot = head * tl.num_programs(0) + split
    tl.store(o_ptr + (slot * R + row[None, :]) * DV + value[:, None], out)
    tl.store(m_ptr + slot * R + row, m)
    tl.store(l_ptr + slot * R + row, total)
