"""Rotary positions of queries and keys in one launch (Triton)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rounded_sum(a, b, c, d, dtype: tl.constexpr):
    """a * b + c * d, each product rounded to dtype first."""
    return ((a * b).to(dtype).to(tl.float32) + (c * d).to(dtype).to(tl.float32)).to(dtype)


_NUMBERS = ["q_heads", "tokens"]
_NUMBERS += [f"{one}_{dim}" for one in ("q", "k", "q_out", "k_out") for dim in "bht"]
_NUMBERS += [f"{one}_{dim}" for one in ("cos", "sin") for dim in "bt"]


@triton.jit(do_not_specialize=_NUMBERS)
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_heads,
    tokens,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    q_out_b,
    q_out_h,
    q_out_t,
    k_out_b,
    k_out_h,
    k_out_t,
    cos_b,
    cos_t,
    sin_b,
    sin_t,
    HALF: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Turn TOKENS tokens (axis 1) of a head (axis 0: of queries, then of keys) of a sequence (axis 2).

    q, k: [B, heads, tokens, 2 * HALF], channels contiguous; cos, sin: [B, tokens, 2 * HALF], likewise; *_out:
    like q and k; *_b, *_h, *_t: strides; CHANNELS: a power of two, at least HALF. Launch it with `ROUNDED`.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    head, sequence = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    row = token.to(tl.int64)[:, None]
    if head < q_heads:
        source = q_ptr + sequence * q_b + head * q_h + row * q_t
        target = q_out_ptr + sequence * q_out_b + head * q_out_h + row * q_out_t
    else:
        source = k_ptr + sequence * k_b + (head - q_heads) * k_h + row * k_t
        target = k_out_ptr + sequence * k_out_b + (head - q_heads) * k_out_h + row * k_out_t
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (token[:, None] < tokens) & (channel < HALF)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    first = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + channel, mask=inside, other=0.0).to(tl.float32)
    cos, sin = cos_ptr + sequence * cos_b + row * cos_t, sin_ptr + sequence * sin_b + row * sin_t
    low_cos = tl.load(cos + channel, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + channel, mask=inside, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + HALF + channel, mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + HALF + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + channel, _rounded_sum(first, low_cos, -second, low_sin, dtype), mask=inside)
    tl.store(target + HALF + channel, _rounded_sum(second, high_cos, first, high_sin, dtype), mask=inside)
