"""The split kernel in float32 and plain loads (Triton), for Triton's interpreter, which cannot run Gluon.

It computes what `quantpress.kernels.attend.split_mma` computes, from the same buffers.
"""

import triton
import triton.language as tl

from quantpress.kernels.attend.dense import tanh
from quantpress.kernels.attend.lookup import code_at
from quantpress.kernels.attend.schedule_kernel import pages_of_program
from quantpress.kernels.padding import padded

PAGE_TOKENS = tl.constexpr(128)
TILE = tl.constexpr(32)


@triton.jit(do_not_specialize=["pages", "heads", "blocks", "page_table_row", "rows"])
def split_plain_kernel(
    q_ptr,
    factor_ptr,
    bias_ptr,
    page_scores_ptr,
    k_ptr,
    ks_ptr,
    v_ptr,
    vs_ptr,
    k_levels_ptr,
    v_levels_ptr,
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
    v_head,
    v_page,
    vs_head,
    vs_page,
    rows,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_SIGNS: tl.constexpr,
    V_SIGNS: tl.constexpr,
    USED: tl.constexpr,
    STARTS: tl.constexpr,
    HEADS: tl.constexpr,
    SCHEDULED: tl.constexpr,
    PAGE_KEYS: tl.constexpr,
):
    """Partial softmax sums of one split (axis 0) of one (batch, KV head, block of rows) (axis 1).

    The arguments are those of `split_mma_kernel`, except k, v: bytes, with strides in bytes; k_levels,
    v_levels: [2**bits] float32, the odd levels in place of a lookup table; no cap where softcap is 0.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    slot = tl.program_id(1).to(tl.int64) * splits + split
    head, block, first, last, unused, used = pages_of_program(
        used_ptr, starts_ptr, schedule_ptr, heads, blocks, pages, USED, STARTS, HEADS, SCHEDULED, PAGE_TOKENS
    )
    if HEADS:
        if first >= last:
            return
    else:
        k_ptr += head * k_head
        v_ptr += head * v_head
        ks_ptr += head * ks_head
        vs_ptr += head * vs_head
    K_PLANES: tl.constexpr = K_BITS if K_SIGNS else 1
    V_PLANES: tl.constexpr = V_BITS if V_SIGNS else 1
    row, token = tl.arange(0, R), tl.arange(0, TILE)
    kept = block % blocks * R + row < rows
    P: tl.constexpr = padded(D)
    PV: tl.constexpr = padded(DV)
    channel, value = tl.arange(0, P), tl.arange(0, PV)
    q_ptr += (block * K_PLANES * 2 * R + 2 * row[None, :]) * P + channel[:, None]
    factor = tl.load(factor_ptr + block * R + row) * 0.5  # levels are 2 * b + 1 here, b there
    bias = tl.load(bias_ptr + block * R + row)
    for plane in tl.static_range(V_PLANES):  # a sum of each plane of values, in a pass of its own
        m = tl.full([R], -1e30, tl.float32)
        total = tl.zeros([R], tl.float32)
        acc = tl.zeros([PV, R], tl.float32)
        for step in range(first * 4, last * 4):
            page = head * 0 + step // 4  # int64 like head
            inside = step % 4 * TILE + token
            at = page * PAGE_TOKENS + inside
            added = bias
            if PAGE_KEYS:
                of_page = page_scores_ptr + (block * pages + page) * (2 * R) + row
                added += tl.load(of_page, mask=kept, other=0.0)
                sink = bias + tl.load(of_page + R, mask=kept, other=0.0)
            live = (at >= unused) & (at < used)
            if HEADS:
                page = tl.load(page_table_ptr + head * page_table_row + page).to(tl.int64)
            s = tl.zeros([TILE, R], tl.float32)
            for part in tl.static_range(K_PLANES):
                codes = code_at(
                    k_ptr + page * k_page + part * (16 * D),
                    inside[:, None],
                    channel[None, :],
                    D,
                    1 if K_SIGNS else K_BITS,
                    False,
                    live[:, None] & (channel < D)[None, :],
                )
                k = tl.load(k_levels_ptr + codes)
                of_part = q_ptr + part * (2 * R * P)
                q = tl.load(of_part).to(tl.float32) * 256.0 + tl.load(of_part + P).to(tl.float32)
                s = tl.dot(k, q, s, input_precision="ieee")
            ks = tl.load(ks_ptr + page * ks_page + inside, mask=live, other=0.0).to(tl.float32)
            s = s * factor[None, :] * ks[:, None] + added[None, :]
            if PAGE_KEYS:
                s = tl.where(ks[:, None] < 0, sink[None, :], s)
            if softcap > 0:
                s = softcap * tanh(s / softcap)
            s = tl.where(live[:, None], s, float("-inf"))
            new = tl.maximum(m, tl.max(s, 0))
            p = tl.exp2(s - new[None, :])
            decay = tl.exp2(m - new)
            m = new
            total = total * decay + tl.sum(p, 0)
            codes = code_at(
                v_ptr + page * v_page + plane * (16 * DV),
                inside[None, :],
                value[:, None],
                DV,
                1 if V_SIGNS else V_BITS,
                True,
                live[None, :] & (value < DV)[:, None],
            )
            v = tl.load(v_levels_ptr + codes)
            vs = tl.load(vs_ptr + page * vs_page + inside, mask=live, other=0.0).to(tl.float32)
            acc = tl.dot(v, p * vs[:, None], acc * decay[None, :], input_precision="ieee")
        to = o_ptr + ((slot * R + row[None, :]) * V_PLANES + plane) * PV + value[:, None]
        tl.store(to, acc, mask=kept[None, :])
    at = (tl.program_id(1).to(tl.int64) * R + row) * splits + split
    tl.store(m_ptr + at, m)
    tl.store(l_ptr + at, total)
