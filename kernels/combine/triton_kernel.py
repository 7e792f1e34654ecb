"""The kernel of `quantpress.kernels.combine` (Triton)."""

import triton
import triton.language as tl

TOKENS = tl.constexpr(32)
"""Query tokens of one program."""

_NUMBERS = ["heads", "tokens", "channels"]


@triton.jit
def _row_starts(ptr, batch, head, token, stride_b, stride_h, stride_t):
    return ptr + batch * stride_b + head * stride_h + token.to(tl.int64) * stride_t


@triton.jit(do_not_specialize=_NUMBERS)
def combine_kernel(
    output_ptr,
    sum_ptr,
    other_ptr,
    other_sum_ptr,
    heads,
    tokens,
    channels,
    output_b,
    output_h,
    output_t,
    sum_b,
    sum_h,
    sum_t,
    other_b,
    other_h,
    other_t,
    other_sum_b,
    other_sum_h,
    other_sum_t,
    CHANNELS: tl.constexpr,
):
    """Combine `TOKENS` query tokens (axis 0) of one (batch, head) (axis 1).

    output, other: [B, heads, tokens, channels] 16-bit, channels contiguous; sum, other_sum: [B, heads,
    tokens] float32; output and sum are written; *_b, *_h, *_t: strides; CHANNELS: a power of two, at least
    `channels`.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // heads, row % heads
    there = token < tokens
    sums = _row_starts(sum_ptr, batch, head, token, sum_b, sum_h, sum_t)
    own_sum = tl.load(sums, mask=there, other=0.0)
    other_sum = tl.load(
        _row_starts(other_sum_ptr, batch, head, token, other_sum_b, other_sum_h, other_sum_t),
        mask=there,
        other=0.0,
    )
    channel = tl.arange(0, CHANNELS)
    inside = there[:, None] & (channel < channels)[None, :]
    outputs = _row_starts(output_ptr, batch, head, token, output_b, output_h, output_t)
    others = _row_starts(other_ptr, batch, head, token, other_b, other_h, other_t)
    own = tl.load(outputs[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(others[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    most = tl.maximum(own_sum, other_sum)
    own_weight, other_weight = tl.exp(own_sum - most), tl.exp(other_sum - most)
    both = own_weight + other_weight
    joined = (own * own_weight[:, None] + other * other_weight[:, None]) / both[:, None]
    tl.store(outputs[:, None] + channel[None, :], joined, mask=inside)
    tl.store(sums, most + tl.log(both), mask=there)
