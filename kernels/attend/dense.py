"""Tokens kept in 16 bits, attended by programs of the first launch (Triton)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


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
    """Keys [TILE, D] and values [DV, TILE] of the tokens from `start`, zero but from `begin` to `end`."""
    at = start + tl.arange(0, TILE)
    channel, value = tl.arange(0, D), tl.arange(0, DV)
    live = (at >= begin) & (at < end)
    k = tl.load(k_ptr + at[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
    v = tl.load(v_ptr + at[None, :] * DV + value[:, None], mask=live[None, :], other=0.0)
    if PLAIN:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    return k, v


@triton.jit
def load_queries(query_ptr, head, skipped, rows, D: tl.constexpr, R: tl.constexpr, PLAIN: tl.constexpr):
    """R rows of a head's queries: [D, 2R], the second half zero."""
    column = tl.arange(0, 2 * R)
    live = (column < R) & (skipped + column < rows)
    at = (head * rows + skipped + column[None, :]) * D + tl.arange(0, D)[:, None]
    q = tl.load(query_ptr + at, mask=live[None, :], other=0.0)
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
    """Softmax sums over `TILE` tokens from `start`, of those from `begin` to `end`: m and l [R], o [DV, R].

    q [D, 2R] of `load_queries` and query [R], the query token of each row; k and v of `load_tile`. The
    weights are split into a high part and a residual in the values' own dtype. Query i does not see the last
    hidden - i tokens. CHAINED: the next kernel may start when the tile is there.
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
    return m, tl.sum(p, 0), tl.sum(tl.reshape(o, [DV, 2, R]), 1)
