"""Tokens kept in 16 bits, attended by a program of the split kernel (Triton)."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Hyperbolic tangent of a float32 tile, without libdevice."""
    e = tl.exp(-2 * tl.abs(x))
    return tl.where(x < 0, e - 1, 1 - e) / (1 + e)


@triton.jit
def attend_tokens(
    q,
    k_ptr,
    v_ptr,
    tokens,
    hidden,
    queries,
    scale,
    softcap,
    m,
    total,
    acc,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Take one run of tokens into a running softmax.

    q [D, 2R], its second half zero; k [tokens, D] and v [tokens, DV] contiguous; m and total [R]; acc [DV,
    2R], whose halves are summed at the end. The weights are split into a high part and a residual in the
    values' own dtype. Row r is query r % queries, and does not see the last hidden - r % queries tokens.
    """
    column, row = tl.arange(0, 2 * R), tl.arange(0, R)
    channel, value, token = tl.arange(0, D), tl.arange(0, DV), tl.arange(0, TILE)
    for start in tl.range(0, tokens, TILE, num_stages=1):  # shared memory is for the pages
        at = start + token
        live = at < tokens
        k = tl.load(k_ptr + at[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
        v = tl.load(v_ptr + at[None, :] * DV + value[:, None], mask=live[None, :], other=0.0)
        if PLAIN:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        both = tl.dot(k, q, input_precision="ieee")
        s = tl.sum(tl.reshape(both, [TILE, 2, R]), 1) * scale
        if softcap > 0:
            s = softcap * tanh(s / softcap)
        seen = live[:, None] & (at[:, None] < tokens - tl.maximum(hidden - row[None, :] % queries, 0))
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - new[None, :])
        decay = tl.exp2(m - new)
        m = new
        total = total * decay + tl.sum(p, 0)
        acc = acc * tl.reshape(tl.broadcast_to(decay[None, :], [2, R]), [2 * R])[None, :]
        twice = tl.reshape(tl.broadcast_to(p[:, None, :], [TILE, 2, R]), [TILE, 2 * R])
        high = twice.to(v.dtype)
        split = tl.where(column[None, :] < R, high.to(tl.float32), twice - high.to(tl.float32)).to(v.dtype)
        acc = tl.dot(v, split, acc, input_precision="ieee")
    return m, total, acc
