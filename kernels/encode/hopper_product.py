# mypy: allow-untyped-defs
"""Products of the Hopper encode kernel: 64 vectors of 128 channels times the rotation, by tensor cores.

The rotation is a Hadamard matrix with signs, so with the 64 channels of each half as rows, a and b,

    y[:64] = x[:64] a + x[64:] b,   y[64:] = x[:64] a - x[64:] b

and the tensor cores do half of the work. Entries are +1 and -1 times a power of two, so a 16-bit product is
as good as float32 for values. For keys the weights go into the matrix. Those that caches have are numbers of
bfloat16 (`quantpress.quantization.transform`), so a matrix of the keys' own dtype holds them. Other weights
take the sum of two float16 matrices that hold 22 bits, and the keys go into float16, which holds all bfloat16
numbers but the smallest and the largest. The mean comes in as further rows of the product, times constant
columns, so that nothing is done to single channels. What float32 loses is then relative to the key, not to
its distance from the mean.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from quantpress.kernels.gluon_names import async_load, barrier, reinterpret

WEIGHT_RANGE = gl.constexpr(2048.0)
"""Largest weight over least; beyond, float16 does not hold the small ones."""
OUTWEIGH = gl.constexpr(1024.0)  # one part of the mean over the next, as constant columns have it


@gluon.constexpr_function
def half_layout():
    """[64, 64] of a product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])


@gluon.constexpr_function
def matrix_layout():
    """[128, 64] of a matrix on its way to shared memory."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.constexpr_function
def each_warp():
    """[128] in each warp, so that a reduction needs no other."""
    return gl.DistributedLinearLayout([[1], [2]], [[4], [8], [16], [32], [64]], [[0], [0]], [], [128])


@gluon.constexpr_function
def swizzled(width):
    """Rows of `width` bytes in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=16, rank=2)


@gluon.jit
def token_of(row, BITS: gl.constexpr):
    """The token of a row of the first tile, counted over two pages at 3 bits, else within one."""
    if BITS == 3:
        token = row // 32 * 128 + (row // 16 % 2) * 8 + (row // 8 % 2) * 16 + row % 8
    else:
        token = 64 * (row // 8 % 2) + 8 * (row // 16) + row % 8
    return token


@gluon.jit
def tile_start(tile, BITS: gl.constexpr):
    """Tokens before a tile's first; at 3 bits the last tile of a page is encoded first."""
    start = tile * 32
    if BITS == 3:
        start = (tile + 3) % 4 * 32
    return start


@gluon.jit
def fetch(x_ptr, element, second, xs, page, tile, pages, stride_t: gl.constexpr, BITS: gl.constexpr):
    """Start copying a tile to shared memory xs, unless its page is past the end.

    element: offsets of the first tile's numbers; second: 1 where a row is of the second of two pages.
    """
    if page < pages:
        base = x_ptr + page.to(gl.int64) * 128 * stride_t + tile_start(tile, BITS) * stride_t
        if BITS == 3:  # the second page may not be there
            async_load(xs, base + element, mask=page + second < pages)
        else:
            async_load(xs, base + element)
    async_copy.commit_group()


@gluon.jit
def signs(matrix_ptr):
    """The rotation's first 64 columns [128, 64] from [128, 64]."""
    row = gl.arange(0, 128, layout=gl.SliceLayout(1, matrix_layout()))
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, matrix_layout()))
    return gl.load(matrix_ptr + row[:, None] * 64 + column[None, :])


@gluon.jit
def weighted(matrix_ptr, mean_ptr, weight_ptr, DTYPE: gl.constexpr, MEAN: gl.constexpr, WEIGHT: gl.constexpr):
    """Matrices for keys in shared memory, of one head.

    Returns:
        Whether DTYPE, that of the vectors, holds the weights exactly; the high and the low parts of the
        weighted rotation [128, 64]; the constant columns [64, 16]; the rows of the mean [32, 64], 16 for each
        half, that these are multiplied by; the power of two that all is multiplied by; and the largest weight
        times that, infinite where weights differ too much. Where DTYPE is exact there are no low parts, and
        the other matrices are in DTYPE, else in float16.
    """
    row = gl.arange(0, 128, layout=gl.SliceLayout(1, matrix_layout()))
    channel = gl.arange(0, 128, layout=each_warp())
    rotation = signs(matrix_ptr)  # first: loads do not wait for each other
    weight = gl.full([128], 1.0, gl.float32, row.type.layout)
    every = gl.full([128], 1.0, gl.float32, channel.type.layout)
    mean = gl.full([128], 0.0, gl.float32, row.type.layout)
    if WEIGHT:
        weight = gl.load(weight_ptr + row).to(gl.float32)
        every = gl.load(weight_ptr + channel).to(gl.float32)
    if MEAN:
        mean -= gl.load(mean_ptr + row).to(gl.float32)
    most = gl.max(every, 0)
    unit = ((127 + 127 + 5 - (most.to(gl.int32, bitcast=True) >> 23)) << 23).to(gl.float32, bitcast=True)
    every *= unit
    weight *= unit
    exact = gl.max(gl.abs(weight - weight.to(DTYPE).to(gl.float32)), 0) == 0  # false for NaN
    rotation = rotation.to(gl.float32) * weight[:, None]
    halves = gl.sum(gl.reshape(rotation * mean[:, None], [2, 64, 64]), 1)
    mean_u, mean_v = gl.split(gl.permute(halves, [1, 0]))
    mean_u = gl.convert_layout(mean_u, gl.SliceLayout(0, matrix_layout()))
    mean_v = gl.convert_layout(mean_v, gl.SliceLayout(0, matrix_layout()))
    highs = gl.allocate_shared_memory(gl.float16, [128, 64], swizzled(128))
    lows = gl.allocate_shared_memory(gl.float16, [128, 64], swizzled(128))
    means = gl.allocate_shared_memory(gl.float16, [32, 64], swizzled(128))
    columns = gl.allocate_shared_memory(gl.float16, [64, 16], swizzled(32))
    if exact:
        in_dtype(highs, DTYPE).store(rotation.to(DTYPE))
        in_dtype(means, DTYPE).slice(0, 16, 0).store(_three_parts(mean_u, DTYPE))
        in_dtype(means, DTYPE).slice(16, 16, 0).store(_three_parts(mean_v, DTYPE))
        in_dtype(columns, DTYPE).store(_constant_columns(DTYPE))
    else:
        high = rotation.to(gl.float16)
        highs.store(high)
        lows.store((rotation - high.to(gl.float32)).to(gl.float16))
        means.slice(0, 16, 0).store(_three_parts(mean_u, gl.float16))
        means.slice(16, 16, 0).store(_three_parts(mean_v, gl.float16))
        columns.store(_constant_columns(gl.float16))
    largest = gl.where(gl.max(-every, 0) * -WEIGHT_RANGE < most * unit, float("inf"), most * unit)
    barrier()  # without it Triton 3.9 spills 200 bytes
    return exact, highs, lows, columns, means, unit, largest


@gluon.jit
def in_dtype(shared, DTYPE: gl.constexpr):
    """Shared memory of float16 numbers as that of another 16-bit dtype."""
    return reinterpret(shared, DTYPE, shared.shape, shared.layout)


@gluon.jit
def _constant_columns(DTYPE: gl.constexpr):
    """[64, 16] of the powers of two that parts of a mean are multiplied by."""
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, matrix_layout()))[:, None]
    part = gl.arange(0, 16, layout=gl.SliceLayout(0, matrix_layout()))[None, :]
    column = gl.where(part == 0, OUTWEIGH, gl.where(part == 1, 1.0, gl.where(part == 2, 1 / OUTWEIGH, 0.0)))
    return (column + 0.0 * token).to(DTYPE)


@gluon.jit
def _three_parts(row, DTYPE: gl.constexpr):
    """[64] float32 -> [16, 64] whose first three rows times the constant columns add up to it."""
    high = (row * (1 / OUTWEIGH)).to(DTYPE)
    row -= high.to(gl.float32) * OUTWEIGH
    middle = row.to(DTYPE)
    row -= middle.to(gl.float32)
    low = (row * OUTWEIGH).to(DTYPE)
    part = gl.arange(0, 16, layout=gl.SliceLayout(1, matrix_layout()))[:, None]
    none = gl.full([64], 0.0, DTYPE, row.type.layout)[None, :]
    others = gl.where(part == 1, middle[None, :], gl.where(part == 2, low[None, :], none))
    return gl.where(part == 0, high[None, :], others)


@gluon.jit
def value_halves(xs, matrix):
    """Products of both halves of the channels of values: two [64, 64] float32."""
    zero = gl.full([64, 64], 0.0, gl.float32, half_layout())
    u = warpgroup_mma(xs.slice(0, 64, 1), matrix.slice(0, 64, 0), zero, use_acc=False, is_async=True)
    v = warpgroup_mma(xs.slice(64, 64, 1), matrix.slice(64, 64, 0), zero, use_acc=False, is_async=True)
    u, v = warpgroup_mma_wait(0, [u, v])
    return u, v


@gluon.jit
def exact_key_halves(xs, matrix, columns, means):
    """Products of both halves of the channels of keys, less their mean; their dtype holds the weights."""
    zero = gl.full([64, 64], 0.0, gl.float32, half_layout())
    u = warpgroup_mma(columns, means.slice(0, 16, 0), zero, use_acc=False, is_async=True)
    u = warpgroup_mma(xs.slice(0, 64, 1), matrix.slice(0, 64, 0), u, is_async=True)
    v = warpgroup_mma(columns, means.slice(16, 16, 0), zero, use_acc=False, is_async=True)
    v = warpgroup_mma(xs.slice(64, 64, 1), matrix.slice(64, 64, 0), v, is_async=True)
    u, v = warpgroup_mma_wait(0, [u, v])
    return u, v


@gluon.jit
def key_halves(x, z, highs, lows, columns, means):
    """Products of both halves of the channels of keys, x and z, less their mean: two [64, 64] float32."""
    zero = gl.full([64, 64], 0.0, gl.float32, half_layout())
    u = warpgroup_mma(columns, means.slice(0, 16, 0), zero, use_acc=False, is_async=True)
    x = x.to(gl.float16)
    u = warpgroup_mma(x, lows.slice(0, 64, 0), u, is_async=True)
    u = warpgroup_mma(x, highs.slice(0, 64, 0), u, is_async=True)
    u = warpgroup_mma_wait(0, [u])  # frees registers
    v = warpgroup_mma(columns, means.slice(16, 16, 0), zero, use_acc=False, is_async=True)
    z = z.to(gl.float16)
    v = warpgroup_mma(z, lows.slice(64, 64, 0), v, is_async=True)
    v = warpgroup_mma(z, highs.slice(64, 64, 0), v, is_async=True)
    v = warpgroup_mma_wait(0, [v])
    return u, v


@gluon.jit
def in_octets(u, v):
    """Columns 0 to 63 and 64 to 127 of y -> eight tensors [w, g, o, t], one for each of (h, (e, s))."""
    a0, b0, c0, d0, a1, b1, c1, d1 = octets_of_half(u)
    e0, f0, g0, h0, e1, f1, g1, h1 = octets_of_half(v)
    a0, b0, c0, d0 = joined(a0, e0), joined(b0, f0), joined(c0, g0), joined(d0, h0)
    a1, b1, c1, d1 = joined(a1, e1), joined(b1, f1), joined(c1, g1), joined(d1, h1)
    return a0, b0, c0, d0, a1, b1, c1, d1


@gluon.jit
def octets_of_half(y):
    """A half's columns of a product -> eight tensors [w, g, o % 4, t], one for each of (h, (e, s))."""
    y = gl.permute(gl.reshape(y, [4, 2, 8, 4, 2, 4, 2]), [0, 2, 3, 5, 1, 4, 6])
    even, odd = gl.split(y)
    a, c = gl.split(even)
    b, d = gl.split(odd)
    a0, a1 = gl.split(a)
    b0, b1 = gl.split(b)
    c0, c1 = gl.split(c)
    d0, d1 = gl.split(d)
    return a0, b0, c0, d0, a1, b1, c1, d1


@gluon.jit
def joined(u, v):
    """Two [w, g, o % 4, t] -> [w, g, o, t]."""
    return gl.reshape(gl.permute(gl.join(u, v), [0, 1, 4, 2, 3]), [4, 8, 8, 4])
