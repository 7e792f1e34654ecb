# mypy: allow-untyped-defs
"""Mean, energy and balance of keys, second moments of queries, and a search for NaN and infinity (Triton).

Sums are float32 over tiles of 64 tokens. Tiles and splits are joined by their means and their sums of squared
deviations (Chan, Golub and LeVeque 1983), so that no large mean cancels.
"""

import triton
import triton.language as tl

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _tile(ptr, token, stride, end, D: tl.constexpr, CHANNELS: tl.constexpr):
    """Vectors [tokens, CHANNELS] in float32, 0 from token `end` and from channel D on."""
    channel = tl.arange(0, CHANNELS)
    live = (token < end)[:, None] & (channel < D)[None, :]
    at = token.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(ptr + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def token_moments_kernel(
    x_ptr,
    parts_ptr,
    stride_b,
    stride_h,
    stride_t,
    heads,
    tokens,
    per,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean and squared deviations of `per` tokens (axis 0) of one (batch, KV head) (axis 1).

    x: [B, heads, tokens, D] with strides, channels contiguous; parts: [B * heads, splits, 2, CHANNELS]
    float32, written; per: a multiple of TILE; CHANNELS: D, padded to a power of two.
    """
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x_ptr += head // heads * stride_b + head % heads * stride_h
    first = split * per
    end = tl.minimum(first + per, tokens)
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, end, TILE):
        token = start + tl.arange(0, TILE)
        x = _tile(x_ptr, token, stride_t, end, D, CHANNELS)
        count = tl.minimum(end - start, TILE).to(tl.float32)
        before = (start - first).to(tl.float32)
        own = tl.sum(x, 0) / count
        deviation = tl.where((token < end)[:, None], x - own[None, :], 0.0)
        step = own - mean
        share = count / (before + count)
        squares += tl.sum(deviation * deviation, 0) + step * step * (before * share)
        mean += step * share
    at = ((head * tl.num_programs(0) + split) * 2) * CHANNELS + tl.arange(0, CHANNELS)
    tl.store(parts_ptr + at, mean)
    tl.store(parts_ptr + at + CHANNELS, squares)


@triton.jit
def _relative(moment, inside, floor, D: tl.constexpr):
    """A moment over its mean over channels, at least floor; 1 where every channel is zero."""
    average = tl.sum(tl.where(inside, moment, 0.0), 0) / D
    return tl.maximum(tl.where(average > 0, moment / tl.where(average > 0, average, 1.0), 1.0), floor)


@triton.jit
def _any_not_finite(x, inside):
    return tl.max(tl.where(inside & ((tl.abs(x) < _INFINITY) == 0), 1.0, 0.0), 0)


@triton.jit
def key_transform_kernel(
    parts_ptr,
    moment_ptr,
    mean_ptr,
    weight_ptr,
    energy_ptr,
    found_ptr,
    tokens,
    per,
    splits,
    floor,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ENERGY: tl.constexpr,
):
    """The transform of one (batch, KV head) (axis 0) from the moments of its splits.

    parts: of `token_moments_kernel`, `splits` of `per` tokens, at most SPLITS; moment: [BH, D] float32,
    E[q^2], if WEIGHT; mean: [BH, D] float32, written if MEAN; weight: likewise, if WEIGHT; energy: likewise,
    if ENERGY, of weighted keys; found: [BH, 3] float32, written: 1 where the statistics are not finite, 1
    where the moment is not, the least moment; floor: of
    `quantpress.quantization.transform.key_statistics`, as is what weights are rounded to.
    """
    head = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, SPLITS), tl.arange(0, CHANNELS)
    inside = channel < D
    at = (head * splits + split[:, None]) * (2 * CHANNELS) + channel[None, :]
    there = (split < splits)[:, None]
    means = tl.load(parts_ptr + at, mask=there, other=0.0)
    squares = tl.load(parts_ptr + at + CHANNELS, mask=there, other=0.0)
    count = tl.maximum(tl.minimum(tokens - split * per, per), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * count, 0) / tokens
    apart = tl.where(there, means - mean[None, :], 0.0)
    energy = tl.sum(squares + apart * apart * count, 0) / tokens
    if MEAN:
        tl.store(mean_ptr + head * D + channel, mean, mask=inside)
    else:
        energy += mean * mean
    tl.store(found_ptr + head * 3, tl.maximum(_any_not_finite(mean, inside), _any_not_finite(energy, inside)))
    bad, least = 0.0, 0.0
    if WEIGHT:
        moment = tl.load(moment_ptr + head * D + channel, mask=inside, other=0.0)
        bad = _any_not_finite(moment, inside)
        least = tl.min(tl.where(inside, moment, _INFINITY), 0)
        ratio = _relative(moment, inside, floor, D) / _relative(energy, inside, floor, D)
        power = tl.log(tl.where(inside, ratio, 1.0)) * 0.25
        weight = tl.exp(power - tl.sum(power, 0) / D)
        bits = weight.to(tl.int32, bitcast=True)  # to bfloat16, of which the interpreter would cut bits off
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        weight = bits.to(tl.float32, bitcast=True)
        weight = tl.where(tl.max(tl.where(inside, moment, 0.0), 0) > 0, weight, 1.0)
        tl.store(weight_ptr + head * D + channel, weight, mask=inside)
        energy *= weight * weight
    tl.store(found_ptr + head * 3 + 1, bad)
    tl.store(found_ptr + head * 3 + 2, least)
    if ENERGY:
        tl.store(energy_ptr + head * D + channel, energy, mask=inside)


@triton.jit
def query_moment_kernel(
    q_ptr,
    computed_ptr,
    actual_ptr,
    moment_ptr,
    agree_ptr,
    q_b,
    q_h,
    q_t,
    computed_b,
    computed_h,
    computed_t,
    actual_b,
    actual_h,
    actual_t,
    kv_heads,
    all_heads,
    group,
    queries,
    checked,
    tolerance,
    D: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """E[q^2] of one (batch, KV head) (axis 0), 0 where the keys are not right.

    q: [B, kv_heads * group, queries, D]; computed, actual: [B, kv_heads, checked, D], if CHECK; each with
    strides *_b, *_h, *_t, channels contiguous. moment: [all_heads, D] float32 and agree: [1] int32, written;
    all_heads: B * kv_heads; tolerance: most error relative to the norm of all actual keys.
    """
    head = tl.program_id(0).to(tl.int64)
    channel, row = tl.arange(0, CHANNELS), tl.arange(0, TILE)
    query = tl.arange(0, ROWS)
    inside = channel < D
    q_ptr += head // kv_heads * q_b + head % kv_heads * group * q_h + channel[None, :]
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, group * queries, ROWS):
        at = start + query
        offset = (at // queries).to(tl.int64) * q_h + (at % queries).to(tl.int64) * q_t
        live = (at < group * queries)[:, None] & inside[None, :]
        q = tl.load(q_ptr + offset[:, None], mask=live, other=0.0).to(tl.float32)
        total += tl.sum(q * q, 0)
    moment = total / (group * queries)
    if CHECK:  # every program does, for the keys of all heads: they are few
        errors = tl.zeros([CHANNELS], tl.float32)
        norms = tl.zeros([CHANNELS], tl.float32)
        kept = tl.zeros([CHANNELS], tl.int32)
        dtype: tl.constexpr = actual_ptr.dtype.element_ty
        for start in range(0, all_heads * checked, TILE):
            at = start + row
            of = (at // checked).to(tl.int64)
            entry, of_entry, token = of // kv_heads, of % kv_heads, (at % checked).to(tl.int64)
            live = (at < all_heads * checked)[:, None] & inside[None, :]
            offset = (entry * computed_b + of_entry * computed_h + token * computed_t)[:, None]
            k = tl.load(computed_ptr + offset + channel[None, :], mask=live, other=0.0)
            offset = (entry * actual_b + of_entry * actual_h + token * actual_t)[:, None]
            true = tl.load(actual_ptr + offset + channel[None, :], mask=live, other=0.0)
            true = true.to(tl.float32)
            error = (k.to(tl.float32) - true).to(dtype).to(tl.float32)
            error = tl.where(true != 0, error, error * 0.0)  # NaN stays
            errors += tl.sum(error * error, 0)
            norms += tl.sum(true * true, 0)
            kept |= tl.max((true != 0).to(tl.int32), 0)
        norm = tl.sqrt(tl.sum(norms, 0))
        agree = (tl.sqrt(tl.sum(errors, 0)) <= tolerance * norm) & (tl.max(kept, 0) > 0)
        moment = tl.where(agree, moment, 0.0)
        if head == 0:
            tl.store(agree_ptr, agree.to(tl.int32))
    tl.store(moment_ptr + head * D + channel, moment, mask=inside)


@triton.jit
def not_finite_kernel(first_ptr, second_ptr, flag_ptr, first_size, second_size, BLOCK: tl.constexpr):
    """Set flag [2] to 1 for a tensor (axis 1) that holds NaN or infinity; programs of axis 0 share it.

    first, second: contiguous; *_size: their numbers.
    """
    which = tl.program_id(1)
    if which == 0:
        source, size = first_ptr, first_size
    else:
        source, size = second_ptr, second_size
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < size, other=0.0).to(tl.float32)
        bad |= (tl.abs(x) < _INFINITY) == 0
    tl.store(flag_ptr + which, 1, mask=tl.max(bad, 0) > 0)
