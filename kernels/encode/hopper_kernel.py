# mypy: allow-untyped-defs
"""The Hopper encode kernel (Gluon, sm_90): vectors of 128 channels, 2 to 4 bits.

Programs of four warps loop over the pages of one (batch, KV head), 64 tokens at a time. `cp.async` loads the
vectors of the next tile while one is encoded; the rotation stays in shared memory (`hopper_product`). Four
programs share a multiprocessor, with 128 registers a thread.

The product leaves rows 16 w + 8 h + g and columns 16 o + 8 e + 2 t + s in lane 4 g + t of warp w. Two rows h
and four columns (e, s) at a time go through the assembly of `octets`. Rows are numbered so that h is a part
of a word, and columns (by the order of the rotation's columns) so that

    keys    a thread has whole words: words 4 t .. 4 t + 3 of both blocks of 64 channels
    values  a thread has one byte of the words of four channels, which four lanes g % 4 exchange

At 4 bits each tile has words of its own; at 2 bits both tiles of a page have the same words. At 3 bits a tile
is 32 tokens of each of two pages, and the fields of the first tile are spread over the words of the other
three.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from quantpress.kernels.encode.hopper_product import (
    exact_key_halves,
    fetch,
    half_layout,
    in_dtype,
    in_octets,
    joined,
    key_halves,
    octets_of_half,
    signs,
    swizzled,
    tile_start,
    token_of,
    value_halves,
    weighted,
)
from quantpress.kernels.encode.hopper_words import store_scales, words_of
from quantpress.kernels.gluon_index import index_along


@gluon.jit
def _row_sum(x):
    """[w, g, o, t] -> [w, g]."""
    return gl.sum(gl.sum(x, 2), 2)


@gluon.jit
def _squares(a, b, c, d):
    return a * a + b * b + c * c + d * d


@gluon.jit
def _sum_and_difference(u, v, steep, CENTRE: gl.constexpr):
    """(u + v) * steep + CENTRE and (u - v) * steep + CENTRE, in three operations."""
    scaled = u * steep + CENTRE
    return joined(scaled + v * steep, scaled - v * steep)


@gluon.jit
def _in_range(square, least, most, VANISHES: gl.constexpr):
    good = (square < most) & (square > least)  # false for NaN
    if VANISHES:  # what the scale's dtype cannot hold has scale 0
        good = good | (square == 0)
    return good


@gluon.jit
def _scale(square, over, added, factor, largest, VALUES: gl.constexpr, BITS: gl.constexpr):
    """The scale of vectors [w, g], from what the assembly added up for each octet."""
    norm = square * over
    if VALUES:
        inverse = gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [_row_sum(added).to(gl.float32)],
            dtype=gl.float32,
            is_pure=True,
            pack=1,
        )
        if BITS == 2:
            inverse *= norm
        scale = gl.where(square == 0, 0.0, norm * factor * inverse)
    else:
        scale = norm * factor * gl.rsqrt(_row_sum(added).to(gl.float32))
    return gl.minimum(scale, largest)


@gluon.jit(do_not_specialize=["turn"])
def encode_hopper_kernel(
    x_ptr,
    mean_ptr,
    weight_ptr,
    matrix_ptr,
    table_ptr,
    words_ptr,
    scale_ptr,
    flag_ptr,
    stride_b,
    stride_h,
    stride_t: gl.constexpr,
    heads,
    pages,
    turn,
    factor,
    largest,
    least,
    most,
    ASM: gl.constexpr,
    REGISTERS: gl.constexpr,
    GATHER: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr,
    ZERO0: gl.constexpr,
    ZERO1: gl.constexpr,
    STEEP: gl.constexpr,
    CENTRE: gl.constexpr,
    BITS: gl.constexpr,
    VALUES: gl.constexpr,
    MEAN: gl.constexpr,
    WEIGHT: gl.constexpr,
):
    """Encode pages, at 3 bits pairs of pages, of one (batch, KV head) (axis 1), divided over axis 0.

    x: [B, heads, T, 128] 16-bit with strides stride_b, stride_h, stride_t, channels contiguous, every vector
    at a multiple of 16 bytes; stride_t is a constant, so the kernel is compiled for each; mean, weight:
    [B * Hkv, 128], for keys, if MEAN and WEIGHT; matrix: [128, 64], half of the rotation without its factor,
    columns in the order of the tiles; table: [20] int32, each word of `octet_table` four times; words:
    [B, Hkv, P, bytes / 4] int32 and scale: [B, Hkv, P, 128], written; factor: the scale is factor times |y|
    over what ASM adds up (values; at 2 bits times |y| again) or over its root (keys), with y as it leaves the
    product; largest: of the scale's dtype; ASM, REGISTERS: of `octet_assembly`; GATHER, GATHER_REGISTERS:
    of `gather_assembly`; ZERO0, ZERO1: of `zero_fields`; STEEP: what 1 / |y| is multiplied by for ASM;
    CENTRE: what ASM takes coordinates about, at 3 and 4 bits; turn: of `turn_of`.

    flag [1] becomes 2 where |y|^2 is not between `least` (of keys: times the squared largest weight) and
    `most` or is not finite, or where weights differ too much; the planes are not valid then.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    TILES: gl.constexpr = 4 if BITS == 3 else 2
    PAGES: gl.constexpr = 2 if BITS == 3 else 1
    VANISHES: gl.constexpr = scale_ptr.dtype.element_ty == gl.float16

    head = gl.program_id(1)
    x_ptr += (head // heads).to(gl.int64) * stride_b + (head % heads).to(gl.int64) * stride_h
    scale_ptr += head.to(gl.int64) * pages * 128
    words_ptr += head.to(gl.int64) * pages * (BITS * 512)
    index = gl.program_id(0)
    page = (index + (head >> turn & 1) * (gl.num_programs(0) - 1 - 2 * index)) * PAGES
    step = gl.num_programs(0) * PAGES

    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    element = token_of(row, BITS)[:, None] * stride_t + channel[None, :]
    second = (row // 32)[:, None]
    if BITS > 2 or not VALUES:
        xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [64, 128], swizzled(128))
        fetch(x_ptr, element, second, xs, page, 0, pages, stride_t, BITS)
    if VALUES:
        matrix = gl.allocate_shared_memory(
            x_ptr.dtype.element_ty, [128, 64], swizzled(128), signs(matrix_ptr)
        )
        lows = matrix
        columns = matrix
        means = matrix
        exact = True
    else:
        exact, matrix, lows, columns, means, unit, heaviest = weighted(
            matrix_ptr,
            mean_ptr + head * 128,
            weight_ptr + head * 128,
            x_ptr.dtype.element_ty,
            MEAN,
            WEIGHT,
        )
        factor = factor / unit
        least = least * heaviest * heaviest
    if VALUES and BITS == 2:  # in front of the matrix it is slower
        xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [64, 128], swizzled(128))
        fetch(x_ptr, element, second, xs, page, 0, pages, stride_t, BITS)
    next_page = page
    next_tile = 1

    none = gl.full([64, 64], 0, gl.int32, half_layout())
    kept = in_octets(none, none)[0]  # the first tile's, at 2 bits
    spread = words_of(kept, pages, GATHER, GATHER_REGISTERS, BITS, VALUES)[0]  # and at 3 bits
    lanes: gl.constexpr = kept.type.layout
    rows: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(2, lanes))
    t = index_along(3, 4, 4, lanes)
    low = gl.load(table_ptr + t)
    if BITS == 2:  # the others are not used, nor kept in registers
        high, held0, held1, held2 = low, low, low, low
    else:
        high = gl.load(table_ptr + 4 + t)
        held0 = gl.load(table_ptr + 8 + t)
        held1 = gl.load(table_ptr + 12 + t)
        held2 = gl.load(table_ptr + 16 + t)
    tile = 0
    fence_async_shared()
    while page < pages:
        async_copy.wait_group(0)
        if VALUES:
            fence_async_shared()
            u, v = value_halves(xs, matrix)
            fetch(x_ptr, element, second, xs, next_page, next_tile, pages, stride_t, BITS)
        else:
            if exact:
                fence_async_shared()
                DTYPE: gl.constexpr = x_ptr.dtype.element_ty
                u, v = exact_key_halves(
                    xs, in_dtype(matrix, DTYPE), in_dtype(columns, DTYPE), in_dtype(means, DTYPE)
                )
                fetch(x_ptr, element, second, xs, next_page, next_tile, pages, stride_t, BITS)
            else:
                left_layout: gl.constexpr = gl.DotOperandLayout(0, half_layout(), 2)
                x = xs.slice(0, 64, 1).load(left_layout)
                z = xs.slice(64, 64, 1).load(left_layout)
                fetch(x_ptr, element, second, xs, next_page, next_tile, pages, stride_t, BITS)
                u, v = key_halves(x, z, matrix, lows, columns, means)
        next_tile += 1
        if next_tile == TILES:
            next_tile = 0
            next_page += step
        if BITS == 2:
            a0, b0, c0, d0, a1, b1, c1, d1 = in_octets(u + v, u - v)
            square0 = _row_sum(_squares(a0, b0, c0, d0))
            square1 = _row_sum(_squares(a1, b1, c1, d1))
        else:
            a0, b0, c0, d0, a1, b1, c1, d1 = octets_of_half(u)
            e0, f0, g0, h0, e1, f1, g1, h1 = octets_of_half(v)
            square0 = 2 * _row_sum(_squares(a0, b0, c0, d0) + _squares(e0, f0, g0, h0))
            square1 = 2 * _row_sum(_squares(a1, b1, c1, d1) + _squares(e1, f1, g1, h1))
            halves: gl.constexpr = square0.type.layout
            square0 = gl.convert_layout(square0, rows, assert_trivial=True)
            square1 = gl.convert_layout(square1, rows, assert_trivial=True)
        good = _in_range(square0, least, most, VANISHES) & _in_range(square1, least, most, VANISHES)
        over0 = gl.rsqrt(gl.where(square0 > 0, square0, 1.0))
        over1 = gl.rsqrt(gl.where(square1 > 0, square1, 1.0))
        zero = gl.where(square0 == 0, ZERO0, 0) | gl.where(square1 == 0, ZERO1, 0)
        zero = zero[:, :, None][:, :, None, :]
        steep0 = over0 * STEEP
        steep1 = over1 * STEEP
        if BITS > 2:
            of0 = gl.convert_layout(steep0, halves, assert_trivial=True)[:, :, None][:, :, None, :]
            of1 = gl.convert_layout(steep1, halves, assert_trivial=True)[:, :, None][:, :, None, :]
            a0, b0 = _sum_and_difference(a0, e0, of0, CENTRE), _sum_and_difference(b0, f0, of0, CENTRE)
            c0, d0 = _sum_and_difference(c0, g0, of0, CENTRE), _sum_and_difference(d0, h0, of0, CENTRE)
            a1, b1 = _sum_and_difference(a1, e1, of1, CENTRE), _sum_and_difference(b1, f1, of1, CENTRE)
            c1, d1 = _sum_and_difference(c1, g1, of1, CENTRE), _sum_and_difference(d1, h1, of1, CENTRE)
        steep0 = steep0[:, :, None][:, :, None, :]
        steep1 = steep1[:, :, None][:, :, None, :]
        octets, added0, added1 = gl.inline_asm_elementwise(
            ASM,
            REGISTERS,
            [a0, b0, c0, d0, a1, b1, c1, d1, steep0, steep1, zero, low, high, held0, held1, held2],
            dtype=(gl.int32, gl.float32, gl.float32)
            if VALUES and BITS == 2
            else (gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        scale0 = _scale(square0, over0, added0, factor, largest, VALUES, BITS)
        scale1 = _scale(square1, over1, added1, factor, largest, VALUES, BITS)
        start = tile_start(tile, BITS)
        left = pages - page
        store_scales(scale_ptr + page.to(gl.int64) * 128, flag_ptr, scale0, scale1, good, left, start, BITS)
        to_ptr = words_ptr + page.to(gl.int64) * (BITS * 512)
        if BITS == 2:
            if tile == 0:
                kept = octets
            else:
                octets = kept + (octets << 2)
                words, at, there = words_of(octets, left, GATHER, GATHER_REGISTERS, BITS, VALUES)
                gl.store(to_ptr + at, words)
        else:
            words, at, there = words_of(octets, left, GATHER, GATHER_REGISTERS, BITS, VALUES)
            if BITS == 4:
                gl.store(to_ptr + at + tile * (1024 if VALUES else 512), words)
            elif tile == 0:
                spread = words
            else:
                words |= (spread << (4 - tile)) & -0x77777778  # bit 3 of each nibble
                gl.store(to_ptr + at + (tile - 1) * 512, words, mask=there)
        tile += 1
        if tile == TILES:
            tile = 0
            page += step
