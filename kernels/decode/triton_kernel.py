# mypy: allow-untyped-defs
"""Decoding of pages on a GPU (Triton): to code space, or all the way back in one pass.

A program decodes one channel group of 64 tokens. Fields are read by the layout's definition, one word load
each, tiles of values transposed so that neighbours share words. The inverse rotation is a product on 16-bit
tensor cores as good as float32 (see `quantpress.kernels.rotation_matrix`); int8 levels are exact in float16,
others are split in two.
"""

import triton
import triton.language as tl


@triton.jit
def _word(plane_ptr, token, channel, C: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, mask):
    """The word that holds a field, its part and its lane."""
    rows: tl.constexpr = 16 * WIDTH
    inside = token % rows
    if VALUES:
        at = channel * (4 * WIDTH) + inside // 4
        lane = token % 4
    else:
        at = inside * (C // 4) + channel // 4
        lane = channel % 4
    return tl.load(plane_ptr + at, mask=mask, other=0), token // rows, lane


@triton.jit
def _codes(words_ptr, token, channel, C: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, mask):
    """Codes of a page, whose int32 words start at `words_ptr`, for tokens and channels that broadcast."""
    if BITS == 4:
        word, part, lane = _word(words_ptr, token, channel, C, 4, VALUES, mask)
        size = (word >> (16 * part + 4 * lane)) & 7
        code = tl.where(((word >> (8 * lane + 7 - 4 * part)) & 1) == 1, 7 - size, 8 + size)
    elif BITS == 3:
        word, part, lane = _word(words_ptr, token, channel, C, 2, VALUES, mask)
        size = (word >> (16 * (part // 2) + 4 * lane + 2 * (part % 2))) & 3
        word, part, lane = _word(words_ptr + 8 * C, token, channel, C, 1, VALUES, mask)
        code = tl.where(((word >> (8 * lane + 7 - part)) & 1) == 1, 3 - size, 4 + size)
    elif BITS == 2:
        word, part, lane = _word(words_ptr, token, channel, C, 2, VALUES, mask)
        code = (word >> (16 * (part // 2) + 4 * lane + 2 * (part % 2))) & 3
    elif BITS == 1:
        word, part, lane = _word(words_ptr, token, channel, C, 1, VALUES, mask)
        code = 1 - ((word >> (8 * lane + 7 - part)) & 1)
    else:
        word, part, lane = _word(words_ptr, token, channel, C, 8, VALUES, mask)
        code = (word >> (8 * lane + 0 * part)) & 255
    return code


@triton.jit
def _levels(
    words_ptr,
    levels_ptr,
    token,
    part: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Levels of channels part * BK onwards: keys [64, BK], values [BK, 64]; zero beyond the group."""
    channel = part * BK + tl.arange(0, BK)
    if VALUES:
        mask = channel[:, None] < C
        code = _codes(words_ptr, token[None, :], channel[:, None], C, BITS, True, mask)
    else:
        mask = channel[None, :] < C
        code = _codes(words_ptr, token[:, None], channel[None, :], C, BITS, False, mask)
    return tl.load(levels_ptr + code, mask=mask, other=0.0)


@triton.jit
def decode_code_space_kernel(
    words_ptr,
    scale_ptr,
    levels_ptr,
    out_ptr,
    pages,
    D: tl.constexpr,
    START: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Scale times level: keys [B, Hkv, T, D], values [B, Hkv, D, T], float32.

    Half a page an axis 0, (batch, KV head) an axis 1. words [B, Hkv, P, page_bytes / 4] int32, scale
    [B, Hkv, P, 128].
    """
    page, head = tl.program_id(0) // 2, tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) % 2 * 64 + tl.arange(0, 64)
    channel = tl.arange(0, CP)
    at = head * pages + page
    levels = _levels(words_ptr + at * (4 * BITS * C), levels_ptr, token, 0, C, CP, BITS, VALUES)
    scale = tl.load(scale_ptr + at * 128 + token).to(tl.float32)
    if VALUES:
        out_ptr += (head * D + START) * pages * 128 + page * 128
        place = out_ptr + channel[:, None].to(tl.int64) * (pages * 128) + token[None, :]
        tl.store(place, levels * scale[None, :], mask=channel[:, None] < C)
    else:
        place = out_ptr + at * (128 * D) + START + token[:, None] * D + channel[None, :]
        tl.store(place, levels * scale[:, None], mask=channel[None, :] < C)


@triton.jit
def decode_pages_kernel(
    words_ptr,
    scale_ptr,
    levels_ptr,
    matrix_ptr,
    mean_ptr,
    weight_ptr,
    order_ptr,
    out_ptr,
    pages,
    factor,
    D: tl.constexpr,
    START: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    HALVES: tl.constexpr,
    WHOLE: tl.constexpr,
    VALUES: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Vectors [B, Hkv, T, D] in out's dtype: axes and planes as above.

    WHOLE: levels are exact in float16. factor: what a level times a unit of the matrix stands for.
    """
    page, head = tl.program_id(0) // 2, tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) % 2 * 64 + tl.arange(0, 64)
    place = tl.arange(0, CP)
    at = head * pages + page
    acc = tl.zeros([64, CP], tl.float32)
    for part in tl.static_range(CP // BK):
        levels = _levels(words_ptr + at * (4 * BITS * C), levels_ptr, token, part, C, BK, BITS, VALUES)
        if VALUES:
            levels = tl.trans(levels)
        row = part * BK + tl.arange(0, BK)
        matrix_at = matrix_ptr + row[:, None] * CP + place[None, :]
        high = tl.load(matrix_at)
        big = levels.to(tl.float16)
        if HALVES == 2:
            acc = tl.dot(big, tl.load(matrix_at + CP * CP), acc)
        if not WHOLE:
            acc = tl.dot((levels - big.to(tl.float32)).to(tl.float16), high, acc)
        acc = tl.dot(big, high, acc)
    scale = tl.load(scale_ptr + at * 128 + token).to(tl.float32)
    y = acc * (scale * factor)[:, None]
    inside = place < C
    channel = START + place
    if ORDER:
        channel = tl.load(order_ptr + head * D + channel, mask=inside, other=0).to(tl.int32)
    if WEIGHT:
        y = y / tl.load(weight_ptr + head * D + channel, mask=inside, other=1.0)[None, :]
    if MEAN:
        y = y + tl.load(mean_ptr + head * D + channel, mask=inside, other=0.0)[None, :]
    out_ptr += at * (128 * D)
    tl.store(
        out_ptr + token[:, None] * D + channel[None, :], y.to(out_ptr.dtype.element_ty), mask=inside[None, :]
    )
