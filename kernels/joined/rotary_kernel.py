"""Rotary positions of queries and keys in one launch (Triton)."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _rounded_sum(a, b, c, d, dtype: tl.constexpr):
    """a * b + c * d, each product rounded to dtype first."""
    return ((a * b).to(dtype).to(tl.float32) + (c * d).to(dtype).to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["q_heads", "k_heads", "q_b", "q_h", "k_b", "k_h", "cos_b", "sin_b"])
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_heads,
    k_heads,
    q_b,
    q_h,
    k_b,
    k_h,
    cos_b,
    sin_b,
    HALF: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Turn one head (axis 0: those of the queries, then those of the keys) of one sequence (axis 1).

    q, k: [B, heads, 1, 2 * HALF], channels contiguous; cos, sin: [B, 1, 2 * HALF], likewise; *_out: like q
    and k, contiguous; *_b, *_h: strides; CHANNELS: a power of two, at least HALF. Launch it with `ROUNDED`.
    """
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if head < q_heads:
        source = q_ptr + sequence * q_b + head * q_h
        target = q_out_ptr + (sequence * q_heads + head) * (2 * HALF)
    else:
        source = k_ptr + sequence * k_b + (head - q_heads) * k_h
        target = k_out_ptr + (sequence * k_heads + head - q_heads) * (2 * HALF)
    channel = tl.arange(0, CHANNELS)
    inside = channel < HALF
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    first = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + channel, mask=inside, other=0.0).to(tl.float32)
    cos, sin = cos_ptr + sequence * cos_b + channel, sin_ptr + sequence * sin_b + channel
    low_cos = tl.load(cos, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin, mask=inside, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + HALF, mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + channel, _rounded_sum(first, low_cos, -second, low_sin, dtype), mask=inside)
    tl.store(target + HALF + channel, _rounded_sum(second, high_cos, first, high_sin, dtype), mask=inside)
