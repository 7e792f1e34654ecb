# mypy: allow-untyped-defs
"""Encoding of whole pages on Hopper (Gluon, sm_90): vectors of 128 channels, 2 to 4 bits.

Programs of four warps loop over the pages of one (batch, KV head), 64 tokens at a time. `cp.async` loads the
vectors of the next tile while one is encoded; the rotation stays in shared memory. Its entries are +1 and -1,
so a 16-bit product is as good as float32: values go in as they are, keys are transformed (mean, weight) and
split into two float16 parts. Four programs share a multiprocessor, with 128 registers a thread.

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
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quantpress.kernels.gluon_copy import async_load
from quantpress.kernels.gluon_index import index_along

MOST_SQUARE = gl.constexpr(2.0**120)  # squared norm of a vector as it leaves the product
STEP = gl.constexpr(32)
"""Channels of keys in one product: both parts of the split keys must fit into registers."""


@gluon.constexpr_function
def _product_layout():
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])


@gluon.constexpr_function
def _gathered_layout():
    """[w 4, g // 4 2, o % 4 4, o // 4 2, g % 4 4, t 4] with o in registers, t and g in lanes, w in warps."""
    unit = [[n if k == dim else 0 for k in range(6)] for dim, n in ((2, 1), (2, 2), (3, 1))]
    lane = [[n if k == dim else 0 for k in range(6)] for dim, n in ((5, 1), (5, 2), (4, 1), (4, 2), (1, 1))]
    warp = [[n if k == dim else 0 for k in range(6)] for dim, n in ((0, 1), (0, 2))]
    return gl.DistributedLinearLayout(unit, lane, warp, [], [4, 2, 4, 2, 4, 4])


@gluon.jit
def _token_of(row, BITS: gl.constexpr):
    """The token of a row of the first tile, counted over two pages at 3 bits, else within one."""
    if BITS == 3:
        token = row // 32 * 128 + (row // 16 % 2) * 8 + (row // 8 % 2) * 16 + row % 8
    else:
        token = 64 * (row // 8 % 2) + 8 * (row // 16) + row % 8
    return token


@gluon.jit
def _tile_start(tile, BITS: gl.constexpr):
    """Tokens before a tile's first; at 3 bits the last tile of a page is encoded first."""
    start = tile * 32
    if BITS == 3:
        start = (tile + 3) % 4 * 32
    return start


@gluon.jit
def _fetch(x_ptr, element, second, xs, page, tile, pages, stride_t, BITS: gl.constexpr):
    """Start copying a tile to shared memory xs, unless its page is past the end.

    element: offsets of the first tile's numbers; second: 1 where a row is of the second of two pages.
    """
    if page < pages:
        base = x_ptr + page.to(gl.int64) * 128 * stride_t + _tile_start(tile, BITS) * stride_t
        if BITS == 3:  # the second page may not be there
            async_load(xs, base + element, mask=page + second < pages)
        else:
            async_load(xs, base + element)
    async_copy.commit_group()


@gluon.jit
def _rotated(xs, matrix, weights, offsets, MOVED: gl.constexpr):
    """A tile of vectors, rotated, and before that, if MOVED, transformed: [64, 128] float32."""
    layout: gl.constexpr = _product_layout()
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    y = gl.full([64, 128], 0.0, gl.float32, layout)
    if MOVED:
        for part in gl.static_range(128 // STEP):
            x = xs.slice(part * STEP, STEP, 1).load(left).to(gl.float32)
            weight = weights.slice(part * STEP, STEP).load(gl.SliceLayout(0, left))
            offset = offsets.slice(part * STEP, STEP).load(gl.SliceLayout(0, left))
            x = x * weight[None, :] + offset[None, :]
            big = x.to(gl.float16)
            small = (x - big.to(gl.float32)).to(gl.float16)
            rows = matrix.slice(part * STEP, STEP, 0)
            y = warpgroup_mma(small, rows, y, use_acc=part > 0, is_async=True)
            y = warpgroup_mma(big, rows, y, is_async=True)
            y = warpgroup_mma_wait(0, [y])
    else:
        y = warpgroup_mma(xs, matrix, y, use_acc=False, is_async=True)
        y = warpgroup_mma_wait(0, [y])
    return y


@gluon.jit
def _octets(y):
    """[64, 128] -> eight tensors [w, g, o, t], one for each of (h, (e, s))."""
    y = gl.permute(gl.reshape(y, [4, 2, 8, 8, 2, 4, 2]), [0, 2, 3, 5, 1, 4, 6])
    even, odd = gl.split(y)
    a, c = gl.split(even)
    b, d = gl.split(odd)
    a0, a1 = gl.split(a)
    b0, b1 = gl.split(b)
    c0, c1 = gl.split(c)
    d0, d1 = gl.split(d)
    return a0, b0, c0, d0, a1, b1, c1, d1


@gluon.jit
def _row_sum(x):
    """[w, g, o, t] -> [w, g]."""
    return gl.sum(gl.sum(x, 2), 2)


@gluon.jit
def _in_range(square, least, VANISHES: gl.constexpr):
    good = (square < MOST_SQUARE) & (square > least)  # false for NaN
    if VANISHES:  # what the scale's dtype cannot hold has scale 0
        good = good | (square == 0)
    return good


@gluon.jit
def _store_scales(scale_ptr, flag_ptr, scale0, scale1, good, left, start, BITS: gl.constexpr):
    """Store the scales [w, g] of both rows of a thread, and set the flag where not `good`.

    left: pages from this one on; start: of `_tile_start`.
    """
    layout: gl.constexpr = scale0.type.layout
    token = _token_of(16 * index_along(0, 4, 2, layout) + index_along(1, 8, 2, layout), BITS) + start
    part: gl.constexpr = 16 if BITS == 3 else 64
    there = token // 128 < left
    gl.store(flag_ptr + 0 * token, 2, mask=there & (good == 0))
    gl.store(scale_ptr + token, scale0.to(scale_ptr.dtype.element_ty), mask=there)
    gl.store(scale_ptr + token + part, scale1.to(scale_ptr.dtype.element_ty), mask=there)


@gluon.jit
def _value_words(octets, left, GATHER: gl.constexpr, GATHER_REGISTERS: gl.constexpr, BITS: gl.constexpr):
    """[w, g, o, t] of four channels -> words of four tokens, offsets, whether their page is there."""
    lanes: gl.constexpr = _gathered_layout()
    got = gl.convert_layout(gl.reshape(octets, [4, 2, 4, 2, 4, 4]), lanes)
    got = gl.reshape(gl.permute(got, [0, 1, 3, 4, 5, 2]), [4, 2, 2, 4, 4, 2, 2])
    even, odd = gl.split(got)
    a, c = gl.split(even)
    b, d = gl.split(odd)
    a, b, c, d = gl.inline_asm_elementwise(
        GATHER,
        GATHER_REGISTERS,
        [a, b, c, d],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    words = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), [4, 2, 2, 4, 4, 4])
    flat: gl.constexpr = words.type.layout
    w = index_along(0, 4, 6, flat)
    row = 2 * w + index_along(1, 2, 6, flat)
    tile = 4 * index_along(2, 2, 6, flat) + index_along(3, 4, 6, flat)
    channel = 16 * tile + 4 * index_along(4, 4, 6, flat) + index_along(5, 4, 6, flat)
    if BITS == 3:  # noqa: SIM108
        at = w // 2 * (128 * 12) + row % 4 * 128 + channel
    else:
        at = row * 128 + channel
    return words, at, w // 2 < left


@gluon.jit
def _key_words(octets, left, BITS: gl.constexpr):
    """[w, g, o, t] -> [w, g, block, t, word], offsets, whether their page is there."""
    words = gl.permute(gl.reshape(octets, [4, 8, 2, 4, 4]), [0, 1, 2, 4, 3])
    flat: gl.constexpr = words.type.layout
    w = index_along(0, 4, 5, flat)
    row = 8 * w + index_along(1, 8, 5, flat)
    block = index_along(2, 2, 5, flat)
    word = 4 * index_along(3, 4, 5, flat) + index_along(4, 4, 5, flat)
    if BITS == 3:
        at = w // 2 * (128 * 12) + block * 256 + row % 16 * 16 + word
    else:
        at = block * (512 if BITS == 2 else 1024) + row * 16 + word
    return words, at, w // 2 < left


@gluon.jit
def _words(
    octets,
    left,
    GATHER: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr,
    BITS: gl.constexpr,
    VALUES: gl.constexpr,
):
    if VALUES:
        words, at, there = _value_words(octets, left, GATHER, GATHER_REGISTERS, BITS)
    else:
        words, at, there = _key_words(octets, left, BITS)
    return words, at, there


@gluon.jit
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
    stride_t,
    heads,
    pages,
    factor,
    unit_of_sum,
    largest,
    least,
    ASM: gl.constexpr,
    REGISTERS: gl.constexpr,
    GATHER: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr,
    ZERO0: gl.constexpr,
    ZERO1: gl.constexpr,
    STEEP: gl.constexpr,
    BITS: gl.constexpr,
    VALUES: gl.constexpr,
    MEAN: gl.constexpr,
    WEIGHT: gl.constexpr,
    KEY_UNIT: gl.constexpr,
):
    """Encode pages, at 3 bits pairs of pages, of one (batch, KV head) (axis 1), divided over axis 0.

    x: [B, heads, T, 128] 16-bit with strides stride_b, stride_h, stride_t, channels contiguous, every vector
    at a multiple of 16 bytes; mean, weight: [B * Hkv, 128], for keys, if MEAN and WEIGHT; matrix: [128, 128],
    the rotation without its factor, columns in the order of the tiles; table: [12] int32, of `octet_table`;
    words: [B, Hkv, P, bytes / 4] int32 and scale: [B, Hkv, P, 128], written; factor: |y| of a vector over |y|
    of its product; unit_of_sum: the unit of what ASM adds up, over the product; largest: of the scale's
    dtype; ASM, REGISTERS: of `octet_assembly`; GATHER, GATHER_REGISTERS: of `gather_assembly`; ZERO0, ZERO1:
    of `zero_fields`; STEEP: the polynomial's scale; KEY_UNIT: keys are multiplied by it.

    flag [1] becomes 2 where the square of a product is not above `least`, is too large or is not finite; the
    planes are not valid then.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    operand: gl.constexpr = x_ptr.dtype.element_ty if VALUES else gl.float16
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TILES: gl.constexpr = 4 if BITS == 3 else 2
    PAGES: gl.constexpr = 2 if BITS == 3 else 1
    VANISHES: gl.constexpr = scale_ptr.dtype.element_ty == gl.float16

    head = gl.program_id(1)
    x_ptr += (head // heads).to(gl.int64) * stride_b + (head % heads).to(gl.int64) * stride_h
    scale_ptr += head.to(gl.int64) * pages * 128
    words_ptr += head.to(gl.int64) * pages * (BITS * 512)
    page = gl.program_id(0) * PAGES
    step = gl.num_programs(0) * PAGES

    channel = gl.arange(0, 128, layout=gl.SliceLayout(0, layout))
    row = gl.arange(0, 128, layout=gl.SliceLayout(1, layout))
    matrix = gl.load(matrix_ptr + row[:, None] * 128 + channel[None, :])
    matrix = gl.allocate_shared_memory(operand, [128, 128], swizzled, matrix)
    weights = matrix
    offsets = matrix
    if not VALUES:
        weight = gl.full([128], KEY_UNIT, gl.float32, channel.type.layout)
        if WEIGHT:
            weight *= gl.load(weight_ptr + head * 128 + channel).to(gl.float32)
        offset = gl.full([128], 0.0, gl.float32, channel.type.layout)
        if MEAN:
            offset -= gl.load(mean_ptr + head * 128 + channel).to(gl.float32) * weight
        weights = gl.allocate_shared_memory(gl.float32, [128], flat, weight)
        offsets = gl.allocate_shared_memory(gl.float32, [128], flat, offset)

    xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [64, 128], swizzled)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    element = _token_of(row, BITS)[:, None] * stride_t + channel[None, :]
    second = (row // 32)[:, None]
    _fetch(x_ptr, element, second, xs, page, 0, pages, stride_t, BITS)
    next_page = page
    next_tile = 1

    kept = _octets(gl.full([64, 128], 0, gl.int32, _product_layout()))[0]  # the first tile's, at 2 bits
    spread = _words(kept, pages, GATHER, GATHER_REGISTERS, BITS, VALUES)[0]  # and at 3 bits
    lanes: gl.constexpr = kept.type.layout
    t = index_along(3, 4, 4, lanes)
    low = gl.load(table_ptr + t)
    high = gl.load(table_ptr + 4 + t)
    first = gl.load(table_ptr + 8 + t).to(gl.float32, bitcast=True)
    tile = 0
    fence_async_shared()
    while page < pages:
        async_copy.wait_group(0)
        if VALUES:
            fence_async_shared()
        y = _rotated(xs, matrix, weights, offsets, not VALUES)
        _fetch(x_ptr, element, second, xs, next_page, next_tile, pages, stride_t, BITS)
        next_tile += 1
        if next_tile == TILES:
            next_tile = 0
            next_page += step
        a0, b0, c0, d0, a1, b1, c1, d1 = _octets(y)
        square0 = _row_sum(a0 * a0 + b0 * b0 + c0 * c0 + d0 * d0)
        square1 = _row_sum(a1 * a1 + b1 * b1 + c1 * c1 + d1 * d1)
        good = _in_range(square0, least, VANISHES) & _in_range(square1, least, VANISHES)
        over0 = gl.rsqrt(gl.where(square0 > 0, square0, 1.0))
        over1 = gl.rsqrt(gl.where(square1 > 0, square1, 1.0))
        zero = gl.where(square0 == 0, ZERO0, 0) | gl.where(square1 == 0, ZERO1, 0)
        steep0 = (over0 * STEEP)[:, :, None][:, :, None, :]
        steep1 = (over1 * STEEP)[:, :, None][:, :, None, :]
        zero = zero[:, :, None][:, :, None, :]
        octets, sum0, sum1 = gl.inline_asm_elementwise(
            ASM,
            REGISTERS,
            [a0, b0, c0, d0, a1, b1, c1, d1, steep0, steep1, zero, low, high, first],
            dtype=(gl.int32, gl.float32, gl.float32) if VALUES else (gl.int32, gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
        if VALUES:
            stretch0 = _row_sum(sum0) * (over0 * unit_of_sum)
            stretch1 = _row_sum(sum1) * (over1 * unit_of_sum)
        else:
            stretch0 = gl.sqrt(_row_sum(sum0).to(gl.float32)) * unit_of_sum
            stretch1 = gl.sqrt(_row_sum(sum1).to(gl.float32)) * unit_of_sum
        scale0 = gl.minimum(square0 * over0 * factor / gl.where(square0 == 0, 1.0, stretch0), largest)
        scale1 = gl.minimum(square1 * over1 * factor / gl.where(square1 == 0, 1.0, stretch1), largest)
        start = _tile_start(tile, BITS)
        left = pages - page
        _store_scales(scale_ptr + page.to(gl.int64) * 128, flag_ptr, scale0, scale1, good, left, start, BITS)
        to_ptr = words_ptr + page.to(gl.int64) * (BITS * 512)
        if BITS == 2:
            if tile == 0:
                kept = octets
            else:
                octets = kept + (octets << 2)
                words, at, there = _words(octets, left, GATHER, GATHER_REGISTERS, BITS, VALUES)
                gl.store(to_ptr + at, words)
        else:
            words, at, there = _words(octets, left, GATHER, GATHER_REGISTERS, BITS, VALUES)
            if BITS == 4:
                gl.store(to_ptr + at + tile * (1024 if VALUES else 512), words)
            elif tile == 0:
                spread = words
            else:
                words |= ((spread >> (tile - 1)) & 0x11111111) << 3
                gl.store(to_ptr + at + (tile - 1) * 512, words, mask=there)
        tile += 1
        if tile == TILES:
            tile = 0
            page += step
