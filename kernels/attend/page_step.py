"""What `split_mma` does with a page of packed tokens, or with half of one (Gluon): scores, weights, sums."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from quantpress.kernels.attend.tiles import (
    MOST,
    capped,
    exp2,
    load_scales,
    of_rows,
    of_tokens,
    scales_of_tiles,
    seen_or,
    sums_of_lanes,
    sums_with_keys,
    sums_with_signs,
    weigh,
    weight_operand,
    weighted_sums,
    with_sink,
)
from quantpress.kernels.attend.words import (
    fetch_words,
    fetched_words,
    key_offsets,
    key_words,
    levels_of,
    operand_channels,
    signs_of,
    value_offsets,
    value_words,
)

PAGE_TOKENS = gl.constexpr(128)
FINE = gl.constexpr(1 / 256)
BESIDE = gl.constexpr(128.0)
"""What a bit plane of keys counts beside wider codes: their levels are up to 255, those of bits are 1. So the
queries of both are about as large, and have the same units."""


@gluon.jit
def in_this_order(x):
    """Issue the loads before this line before anything after it that waits for shared memory.

    Without it the assembler puts loads off until their values are needed.
    """
    gl.inline_asm_elementwise(
        "bar.sync 0; mov.b32 $0, 0;", "=r,r,~{memory}", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def row_of_page(page_table_ptr, page, PAGED: gl.constexpr):
    """The row of a head's page in the pool; without a page table the page itself."""
    if PAGED:
        page = gl.load(page_table_ptr + page)
    return page.to(gl.int64)


@gluon.jit
def page_at(index, first, stride, count, lead, STARTS: gl.constexpr):
    """The page that a program reads at step `index` of `count`.

    Its pages are `stride` apart from `first` on; the first `lead` of them, 0 or 1, are read last.
    """
    if STARTS:
        index += lead
        index = gl.where(index >= count, index - count, index)
    return first + index * stride


@gluon.jit
def page_step(
    step,
    pool_row,
    ka,
    kb,
    kc,
    kd,
    va,
    vb,
    vc,
    vd,
    k2a,
    k2b,
    k2c,
    v2a,
    v2b,
    v2c,
    m,
    total,
    weight,
    weight2,
    acc0,
    acc1,
    acc2,
    acc3,
    q0,
    q1,
    q2,
    q3,
    start,
    start2,
    factor,
    bias,
    page_scores_ptr,
    tables,
    key_buffer,
    value_buffer,
    page_table_ptr,
    k_ptr,
    ks_ptr,
    v_ptr,
    vs_ptr,
    k2_ptr,
    k2s_ptr,
    v2_ptr,
    v2s_ptr,
    k_page,
    ks_page,
    v_page,
    vs_page,
    k2_page,
    k2s_page,
    v2_page,
    v2s_page,
    first,
    stride,
    count,
    lead,
    unused,
    used,
    softcap,
    mma: gl.constexpr,
    C: gl.constexpr,
    CV: gl.constexpr,
    R: gl.constexpr,
    ROWS: gl.constexpr,
    K_BITS: gl.constexpr,
    V_BITS: gl.constexpr,
    K_SIGNS: gl.constexpr,
    V_SIGNS: gl.constexpr,
    K_FINE: gl.constexpr,
    V_FINE: gl.constexpr,
    K2_BITS: gl.constexpr,
    V2_BITS: gl.constexpr,
    HALVES: gl.constexpr,
    MASKED: gl.constexpr,
    STARTS: gl.constexpr,
    PAGED: gl.constexpr,
    CAPPED: gl.constexpr,
    PAGE_KEYS: gl.constexpr,
    HALF: gl.constexpr,
    STAGED_K: gl.constexpr,
    STAGED_V: gl.constexpr,
):
    """Add a page, or half of it, to the sums; its keys are loaded already, and the next ones are fetched.

    step: counts pages, or halves of pages if HALVES is 2; pool_row: of the page; ka to kd and va to vd: words
    of keys and values; m [ROWS], total, weight [8, ROWS], acc0 to acc3 [DV, ROWS]: the sums so far; q0 to q3,
    start, factor, bias: the queries; acc1 to acc3, q1 to q3: for more bit planes than one; k2a to k2c, q1 and
    start2, v2a to v2c, acc1 and weight2: of a second group of channels, if K2_BITS, or V2_BITS (C, or CV, is
    then that of a group); C, CV: channels of keys and values, in operands D and DV;
    page_scores_ptr: of this block of rows; tables: `lookup_table` in shared memory; key_buffer, value_buffer:
    of `words_buffer`; the pointers and strides: of this head; first, stride, count, lead: its pages, as
    `_page` has them; unused, used: first token in use and one past the last.

    MASKED: some of the tokens may not be in use. PAGED: pages go by the page table. Words of 3 bits, and of
    bit planes, hold both halves: they are loaded for the first and kept for the second, in shared memory if
    STAGED_K or STAGED_V, else in ka to kd, va to vd; HALF is then which half it is, and -1 where nothing
    is kept.
    """
    D: gl.constexpr = operand_channels(C)
    DV: gl.constexpr = operand_channels(CV)
    WHOLE_K: gl.constexpr = K_BITS == 3 or K_SIGNS
    WHOLE_V: gl.constexpr = V_BITS == 3 or V_SIGNS
    WHOLE_K2: gl.constexpr = K2_BITS == 3 or K2_BITS == 1
    WHOLE_V2: gl.constexpr = V2_BITS == 3 or V2_BITS == 1
    more = step + 1 < HALVES * count
    ahead = gl.where(more, step + 1, step)
    live = more.to(gl.int32)  # behind the last page, one vector for all lanes: a branch would cost more
    next_row = row_of_page(
        page_table_ptr, page_at(ahead // HALVES, first, stride, count, lead, STARTS), PAGED
    )
    if STAGED_V:
        fetch_words(
            value_buffer,
            v_ptr + pool_row * v_page,
            value_offsets(0, DV // 32, CV),
            step,
            4 * CV,
            V_BITS,
            HALVES,
        )
    elif HALF != 1 or not WHOLE_V:
        va, vb, vc, vd = value_words(v_ptr + pool_row * v_page, step, CV, V_BITS, V_SIGNS, HALVES)
    if V2_BITS and (HALF != 1 or not WHOLE_V2):
        v2a, v2b, v2c, _ = value_words(v2_ptr + pool_row * v2_page, step, CV, V2_BITS, V2_BITS == 1, HALVES)
    ks = load_scales(ks_ptr + pool_row * ks_page, step, HALVES)
    vs = load_scales(vs_ptr + pool_row * vs_page, step, HALVES)
    if K2_BITS:
        k2s = load_scales(k2s_ptr + pool_row * k2s_page, step, HALVES)
    if V2_BITS:
        v2s = load_scales(v2s_ptr + pool_row * v2s_page, step, HALVES)
    if PAGE_KEYS:
        at = page_at(step // HALVES, first, stride, count, lead, STARTS) * (2 * R)
        at += gl.arange(0, ROWS, layout=m.type.layout)
        mean_score = gl.load(page_scores_ptr + at)
        sink_score = gl.load(page_scores_ptr + at + R)
    if STAGED_K:
        async_copy.wait_group(1 if STAGED_V else 0)
        a, b, c, d = fetched_words(key_buffer, D // 32, K_BITS)
    else:
        in_this_order(step)
        a, b, c, d = ka, kb, kc, kd
    if K_SIGNS:
        k0, k1, k2, k3 = signs_of(a, step, D, HALVES)
        l0, l1, l2, l3 = k0, k1, k2, k3
        n0, n1, n2, n3 = k0, k1, k2, k3
        o0, o1, o2, o3 = k0, k1, k2, k3
        if K_BITS > 1:
            l0, l1, l2, l3 = signs_of(b, step, D, HALVES)
        if K_BITS > 2:
            n0, n1, n2, n3 = signs_of(c, step, D, HALVES)
        if K_BITS > 3:
            o0, o1, o2, o3 = signs_of(d, step, D, HALVES)
        s0 = sums_with_signs(q0, q1, q2, q3, k0, l0, n0, o0, start, ROWS, D, mma, K_BITS)
        s1 = sums_with_signs(q0, q1, q2, q3, k1, l1, n1, o1, start, ROWS, D, mma, K_BITS)
        if HALVES == 1:
            s2 = sums_with_signs(q0, q1, q2, q3, k2, l2, n2, o2, start, ROWS, D, mma, K_BITS)
            s3 = sums_with_signs(q0, q1, q2, q3, k3, l3, n3, o3, start, ROWS, D, mma, K_BITS)
    else:
        k0, k1, k2, k3 = levels_of(a, b, c, step, tables, 0, D, K_BITS, HALVES)
        s0 = sums_with_keys(q0, k0, start, ROWS, D, mma)
        s1 = sums_with_keys(q0, k1, start, ROWS, D, mma)
        if HALVES == 1:
            s2 = sums_with_keys(q0, k2, start, ROWS, D, mma)
            s3 = sums_with_keys(q0, k3, start, ROWS, D, mma)
        if K_FINE:
            k0, k1, k2, k3 = levels_of(a, b, c, step, tables, 2, D, K_BITS, HALVES)
            s0 += sums_with_keys(q0, k0, start, ROWS, D, mma) * FINE
            s1 += sums_with_keys(q0, k1, start, ROWS, D, mma) * FINE
            if HALVES == 1:
                s2 += sums_with_keys(q0, k2, start, ROWS, D, mma) * FINE
                s3 += sums_with_keys(q0, k3, start, ROWS, D, mma) * FINE
    if K2_BITS:
        if K2_BITS == 1:
            k0, k1, k2, k3 = signs_of(k2a, step, D, HALVES)
        else:
            k0, k1, k2, k3 = levels_of(k2a, k2b, k2c, step, tables, 2, D, K2_BITS, HALVES)
        t0 = sums_with_keys(q1, k0, start2, ROWS, D, mma)
        t1 = sums_with_keys(q1, k1, start2, ROWS, D, mma)
        if HALVES == 1:
            t2 = sums_with_keys(q1, k2, start2, ROWS, D, mma)
            t3 = sums_with_keys(q1, k3, start2, ROWS, D, mma)
    pool_row = next_row
    if STAGED_K:
        fetch_words(
            key_buffer,
            k_ptr + pool_row * k_page,
            key_offsets(0, D // 32, C, 16),
            ahead,
            4 * C,
            K_BITS,
            HALVES,
        )
    elif HALF != 0 or not WHOLE_K:
        ka, kb, kc, kd = key_words(k_ptr + pool_row * k_page, ahead, C, K_BITS, K_SIGNS, HALVES, live)
    if K2_BITS and (HALF != 0 or not WHOLE_K2):
        k2a, k2b, k2c, _ = key_words(
            k2_ptr + pool_row * k2_page, ahead, C, K2_BITS, K2_BITS == 1, HALVES, live
        )
    in_this_order(step)

    ks0, ks1, ks2, ks3 = scales_of_tiles(ks, HALVES)
    s0, s1 = s0 * of_tokens(ks0, s0), s1 * of_tokens(ks1, s1)
    if HALVES == 1:
        s2, s3 = s2 * of_tokens(ks2, s2), s3 * of_tokens(ks3, s3)
    if K2_BITS:
        ks0, ks1, ks2, ks3 = scales_of_tiles(k2s, HALVES)
        if K2_BITS == 1 and K_BITS > 1:
            ks0, ks1, ks2, ks3 = ks0 * BESIDE, ks1 * BESIDE, ks2 * BESIDE, ks3 * BESIDE
        s0, s1 = s0 + t0 * of_tokens(ks0, s0), s1 + t1 * of_tokens(ks1, s1)
        if HALVES == 1:
            s2, s3 = s2 + t2 * of_tokens(ks2, s2), s3 + t3 * of_tokens(ks3, s3)
    if PAGE_KEYS:
        sink_score = (sink_score - mean_score) / gl.maximum(factor, 1e-36)
        s0, s1 = with_sink(s0, ks0, sink_score), with_sink(s1, ks1, sink_score)
        if HALVES == 1:
            s2, s3 = with_sink(s2, ks2, sink_score), with_sink(s3, ks3, sink_score)
    if CAPPED:
        if PAGE_KEYS:
            bias += mean_score
        s0 = capped(s0, factor[None, :], bias[None, :], softcap)
        s1 = capped(s1, factor[None, :], bias[None, :], softcap)
        if HALVES == 1:
            s2 = capped(s2, factor[None, :], bias[None, :], softcap)
            s3 = capped(s3, factor[None, :], bias[None, :], softcap)
        scale = gl.full([ROWS], 1.0, gl.float32, m.type.layout)
    else:
        scale = factor
    if MASKED:
        row = gl.arange(0, 32, layout=gl.SliceLayout(1, s0.type.layout))
        token = page_at(step // HALVES, first, stride, count, lead, STARTS) * PAGE_TOKENS
        token += row // 16 * (16 * HALVES) + row % 8 // 2 * 4 + row // 8 % 2 * 2 + row % 2
        if HALVES == 2:
            token += step % 2 * 16
        s0 = seen_or(s0, token, unused, used, float("-inf"))
        s1 = seen_or(s1, token + 32 * HALVES, unused, used, float("-inf"))
        if HALVES == 1:
            s2 = seen_or(s2, token + 64, unused, used, float("-inf"))
            s3 = seen_or(s3, token + 96, unused, used, float("-inf"))

    largest = gl.maximum(s0, s1)
    if HALVES == 1:
        largest = gl.maximum(largest, gl.maximum(s2, s3))
    top = gl.maximum(gl.max(largest, 0) * scale, -1e30)
    vs0, vs1, vs2, vs3 = scales_of_tiles(vs, HALVES)
    p0, w0 = weigh(s0, scale[None, :], top[None, :], vs0)
    p1, w1 = weigh(s1, scale[None, :], top[None, :], vs1)
    if MASKED:  # a value scale may be NaN
        w0 = seen_or(w0, token, unused, used, 0.0)
        w1 = seen_or(w1, token + 32 * HALVES, unused, used, 0.0)
    p, w, heaviest = p0 + p1, w0 + w1, gl.maximum(w0, w1)
    if HALVES == 1:
        p2, w2 = weigh(s2, scale[None, :], top[None, :], vs2)
        p3, w3 = weigh(s3, scale[None, :], top[None, :], vs3)
        if MASKED:
            w2 = seen_or(w2, token + 64, unused, used, 0.0)
            w3 = seen_or(w3, token + 96, unused, used, 0.0)
        p, w = p + p2 + p3, w + w2 + w3
        heaviest = gl.maximum(heaviest, gl.maximum(w2, w3))
    if V2_BITS:  # in the same units, which keep what counts in the output
        vs0, vs1, vs2, vs3 = scales_of_tiles(v2s, HALVES)
        x0, x1 = p0 * of_tokens(vs0, p0), p1 * of_tokens(vs1, p1)
        if MASKED:
            x0 = seen_or(x0, token, unused, used, 0.0)
            x1 = seen_or(x1, token + 32 * HALVES, unused, used, 0.0)
        x, heaviest = x0 + x1, gl.maximum(heaviest, gl.maximum(x0, x1))
        if HALVES == 1:
            x2, x3 = p2 * of_tokens(vs2, p2), p3 * of_tokens(vs3, p3)
            if MASKED:
                x2 = seen_or(x2, token + 64, unused, used, 0.0)
                x3 = seen_or(x3, token + 96, unused, used, 0.0)
            x, heaviest = x + x2 + x3, gl.maximum(heaviest, gl.maximum(x2, x3))
    most = gl.maximum(gl.max(heaviest, 0), 1e-30)
    if PAGE_KEYS and not CAPPED:  # every score of the page lacks it
        top += mean_score
    new = gl.maximum(m, top)
    decay, gain = exp2(m - new), exp2(top - new)
    m = new
    total = total * of_rows(decay, total) + sums_of_lanes(p, ROWS) * of_rows(gain, total)
    weight = weight * of_rows(decay, total) + sums_of_lanes(w, ROWS) * of_rows(gain, total)
    if V2_BITS:
        weight2 = weight2 * of_rows(decay, total) + sums_of_lanes(x, ROWS) * of_rows(gain, total)

    units = (MOST / most)[None, :]
    if STAGED_V:
        async_copy.wait_group(1 if STAGED_K else 0)
        a, b, c, d = fetched_words(value_buffer, DV // 32, V_BITS)
    else:
        a, b, c, d = va, vb, vc, vd
    n0, n1 = weight_operand(w0 * units, ROWS, mma), weight_operand(w1 * units, ROWS, mma)
    n2, n3 = n0, n1
    if HALVES == 1:
        n2, n3 = weight_operand(w2 * units, ROWS, mma), weight_operand(w3 * units, ROWS, mma)
    fade, grow = of_rows(decay, acc0), of_rows(gain * most * (1.0 / MOST), acc0)
    if V_SIGNS:
        v0, v1, v2, v3 = signs_of(a, step, DV, HALVES)
        acc0 = acc0 * fade + weighted_sums(n0, n1, n2, n3, v0, v1, v2, v3, ROWS, DV, mma, HALVES) * grow
        if V_BITS > 1:
            v0, v1, v2, v3 = signs_of(b, step, DV, HALVES)
            acc1 = acc1 * fade + weighted_sums(n0, n1, n2, n3, v0, v1, v2, v3, ROWS, DV, mma, HALVES) * grow
        if V_BITS > 2:
            v0, v1, v2, v3 = signs_of(c, step, DV, HALVES)
            acc2 = acc2 * fade + weighted_sums(n0, n1, n2, n3, v0, v1, v2, v3, ROWS, DV, mma, HALVES) * grow
        if V_BITS > 3:
            v0, v1, v2, v3 = signs_of(d, step, DV, HALVES)
            acc3 = acc3 * fade + weighted_sums(n0, n1, n2, n3, v0, v1, v2, v3, ROWS, DV, mma, HALVES) * grow
    else:
        v0, v1, v2, v3 = levels_of(a, b, c, step, tables, 1, DV, V_BITS, HALVES)
        acc0 = acc0 * fade + weighted_sums(n0, n1, n2, n3, v0, v1, v2, v3, ROWS, DV, mma, HALVES) * grow
        if V_FINE:
            v0, v1, v2, v3 = levels_of(a, b, c, step, tables, 3, DV, V_BITS, HALVES)
            grow = grow * FINE
            acc0 += weighted_sums(n0, n1, n2, n3, v0, v1, v2, v3, ROWS, DV, mma, HALVES) * grow
    if V2_BITS:
        n0, n1 = weight_operand(x0 * units, ROWS, mma), weight_operand(x1 * units, ROWS, mma)
        n2, n3 = n0, n1
        if HALVES == 1:
            n2, n3 = weight_operand(x2 * units, ROWS, mma), weight_operand(x3 * units, ROWS, mma)
        if V2_BITS == 1:
            v0, v1, v2, v3 = signs_of(v2a, step, DV, HALVES)
        else:
            v0, v1, v2, v3 = levels_of(v2a, v2b, v2c, step, tables, 3, DV, V2_BITS, HALVES)
        acc1 = acc1 * fade + weighted_sums(n0, n1, n2, n3, v0, v1, v2, v3, ROWS, DV, mma, HALVES) * grow
    return (
        pool_row,
        ka,
        kb,
        kc,
        kd,
        va,
        vb,
        vc,
        vd,
        k2a,
        k2b,
        k2c,
        v2a,
        v2b,
        v2c,
        m,
        total,
        weight,
        weight2,
        acc0,
        acc1,
        acc2,
        acc3,
    )
