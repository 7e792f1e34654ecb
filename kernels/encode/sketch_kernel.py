# mypy: allow-untyped-defs
"""Encoding of whole pages with a sketch of what the codes leave over, on a GPU (Triton), in one pass.

As `triton_kernel` in its CAREFUL mode, for one channel group of 1 to 3 bits. The residual of a unit vector
stays in registers, where the codes were made; its product with the sketch's matrix is one on 16-bit tensor
cores that is as good as float32, both in two float16 parts. Signs are joined to words as codes of 1 bit.
"""

import triton
import triton.language as tl

from quantpress.kernels.encode.triton_kernel import (
    CAREFUL,
    held,
    join_fields,
    join_pairs,
    load_matrix,
    plain_fields,
    rotated,
    split_dot,
    store_planes,
    store_words,
    tile_channel,
    tile_token,
)

_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_RESIDUAL_UNIT = tl.constexpr(2.0**10)  # keeps the small parts of residuals among float16's normal numbers


@triton.jit
def _projected(rest, matrix_ptr, high, low, CP: tl.constexpr, HELD: tl.constexpr):
    """Residuals [64, CP] times the sketch's matrix, in any unit; high, low: of `held` if HELD."""
    x = rest * _RESIDUAL_UNIT
    acc = tl.zeros([64, CP], tl.float32)
    if HELD:
        acc = split_dot(x, high, low, acc, 2)
    else:  # one half at a time in shared memory
        big = x.to(tl.float16)
        acc = tl.dot(big, load_matrix(matrix_ptr, 1, 0, CP, CP), acc)
        half = load_matrix(matrix_ptr, 0, 0, CP, CP)
        acc = tl.dot((x - big.to(tl.float32)).to(tl.float16), half, acc)
        acc = tl.dot(big, half, acc)
    return acc


@triton.jit
def encode_sketch_kernel(
    x_ptr,
    mean_ptr,
    weight_ptr,
    order_ptr,
    flag_ptr,
    matrix_ptr,
    sketch_ptr,
    words_ptr,
    scale_ptr,
    signs_ptr,
    residual_ptr,
    stride_b,
    stride_h,
    stride_t,
    heads,
    pages,
    per,
    largest,
    factor,
    BOOK: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    HALVES: tl.constexpr,
    RULE: tl.constexpr,
    VALUES: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Encode `per` pages, from per * axis 0 on, of one (batch, KV head) (axis 1).

    sketch: [2, CP, CP] float16, the sketch's matrix, its rows and columns in the order of the tiles' columns;
    signs [B, Hkv, P, 4 * C] int32 and residual [B, Hkv, P, 128] like scale, written; HELD: whether the
    program keeps `sketch` over all pages. flag [1] becomes 1 where a vector is not finite; its scale is 0
    then. The other arguments are those of `encode_pages_kernel` for one channel group.
    """
    ROWS: tl.constexpr = 32 if VALUES else 64  # of joined fields
    WORDS: tl.constexpr = CP if VALUES else CP // 4
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head // heads * stride_b + head % heads * stride_h
    mean_ptr += head * C
    weight_ptr += head * C
    order_ptr += head * C
    high = held(matrix_ptr, 0, HALVES, BK, CP)
    low = held(matrix_ptr, 1, HALVES, BK, CP)
    sketch_high = held(sketch_ptr, 0, 2 if HELD else 0, CP, CP)
    sketch_low = held(sketch_ptr, 1, 2 if HELD else 0, CP, CP)
    channel = tile_channel(CP, VALUES)
    first_page = tl.program_id(0) * per
    for page in tl.range(first_page, tl.minimum(first_page + per, pages), num_stages=STAGES):
        at = head * pages + page
        vectors_ptr = x_ptr + (at - head * pages) * (128 * stride_t)
        negatives = tl.zeros([ROWS, WORDS], tl.int32)
        words = tl.zeros([ROWS, WORDS], tl.int32)
        if BITS == 3:
            words = join_pairs(words, CP, VALUES)
            others = words
        for tile in tl.range(0, 2, num_stages=1):
            token = tile_token(0, VALUES) + 64 * tile
            y, undo = rotated(
                vectors_ptr,
                stride_t,
                mean_ptr,
                weight_ptr,
                order_ptr,
                matrix_ptr,
                high,
                low,
                token,
                0,
                C,
                CP,
                BK,
                HALVES,
                CAREFUL,
                MEAN,
                WEIGHT,
                ORDER,
            )
            square = tl.sum(y * y, 1)
            finite = square < float("inf")  # false for NaN too
            tl.store(flag_ptr + 0 * token, 1, mask=finite == 0)
            norm = tl.sqrt(square)
            length = tl.where(finite, tl.minimum(norm * factor * undo, _FLOAT32_MAX), 0.0)
            u = y * (1.0 / tl.where(square > 0, norm, 1.0))[:, None]
            lane = token[:, None] % 4 if VALUES else channel[None, :] % 4
            if BITS == 3:  # noqa: SIM108
                first = 16 * (token // 16 % 2)
            else:
                first = 16 * (token // 64) + 2 * (token // 32 % 2)
            sign = 1 << (8 * lane + 7 - token[:, None] // 16)
            field, level = plain_fields(u, first[:, None] + 4 * lane, sign, flag_ptr, 0, BOOK, BITS)
            word = join_fields(field, CP, VALUES)
            if CP != C:
                level = tl.where(channel[None, :] < C, level, 0.0)
            if RULE == 0:
                stretch = tl.full([64], 1.0, tl.float32)
            elif RULE == 1:
                stretch = tl.sqrt(tl.sum(level * level, 1))
            else:
                stretch = tl.sum(level * tl.abs(u), 1)
            scale = tl.minimum(length / tl.where(stretch == 0, 1.0, stretch), largest)
            scale = scale.to(scale_ptr.dtype.element_ty)
            tl.store(scale_ptr + at * 128 + token, scale)
            stored = scale.to(tl.float32) / tl.where(length == 0, 1.0, length)
            rest = u - stored[:, None] * tl.where(u <= 0, -level, level)
            size = length * tl.where(finite, tl.sqrt(tl.sum(rest * rest, 1)), 0.0)
            size = tl.minimum(size, largest)
            tl.store(residual_ptr + at * 128 + token, size.to(residual_ptr.dtype.element_ty))
            projected = _projected(rest, sketch_ptr, sketch_high, sketch_low, CP, HELD)
            negative = join_fields(tl.where(projected < 0, sign, 0), CP, VALUES)
            negatives += negative
            if BITS == 3:
                pairs = join_pairs(word, CP, VALUES)
                words = tl.where(tile == 0, pairs, words)
                others = pairs
            else:
                words += word
        store_words(signs_ptr + at * (4 * C), negatives, 0, C, CP, 1, VALUES)
        codes_ptr = words_ptr + at * (4 * BITS * C)
        if BITS == 3:
            store_planes(codes_ptr, words, others, C, CP, VALUES)
        else:
            store_words(codes_ptr, words, 0, C, CP, BITS, VALUES)
