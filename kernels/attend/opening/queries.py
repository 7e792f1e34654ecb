"""Queries of one program of the split kernel, brought into code space by its one warp (Gluon).

A lane holds D / 32 neighbouring channels of every row. The rotation is a Walsh-Hadamard matrix in Sylvester's
order with signed columns, so it is log2(D) sums and differences of pairs of channels: those within a lane
first, then those of two lanes whose numbers differ in one bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpress.kernels.attend.tiles import MOST

_WHOLE = gl.constexpr(12582912.0)
"""1.5 * 2 ** 23: a float32 this much larger than a small number holds it, rounded, in its low bits."""

_WHOLE_BITS = gl.constexpr(0x4B400000)


@gluon.constexpr_function
def rows_layout(ROWS, D):
    """The layout [ROWS, D] in which a lane has D / 32 channels of each row."""
    return gl.BlockedLayout([ROWS, D // 32], [1, 32], [1, 1], [1, 0])


@gluon.jit
def load_rows(query_ptr, head, skipped, rows, ROWS: gl.constexpr, D: gl.constexpr):
    """Rows `skipped` on of a head's queries, [ROWS, D] float32; zero from row `rows` on.

    query_ptr: [BH, rows, D]; head: which of BH.
    """
    layout: gl.constexpr = rows_layout(ROWS, D)
    row = skipped + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    at = (head * rows + row)[:, None] * D + channel[None, :]
    return gl.load(query_ptr + at, mask=(row < rows)[:, None], other=0.0).to(gl.float32)


@gluon.jit
def load_biases(ptr, head, skipped, rows, ROWS: gl.constexpr, D: gl.constexpr):
    """A number of each row [ROWS], of [BH, rows]; for rows as `load_rows` loads them."""
    row = skipped + gl.arange(0, ROWS, layout=gl.SliceLayout(1, rows_layout(ROWS, D)))
    return gl.load(ptr + head * rows + row, mask=row < rows, other=0.0)


@gluon.jit
def load_channels(ptr, ROWS: gl.constexpr, D: gl.constexpr):
    """A number of each channel, [D], as `turned_queries` takes them."""
    return gl.load(ptr + gl.arange(0, D, layout=gl.SliceLayout(0, rows_layout(ROWS, D))))


@gluon.jit
def load_rows_of(query_ptr, order, head, skipped, rows, ROWS: gl.constexpr, D: gl.constexpr):
    """`load_rows` with channel order[i] in the place of channel i; order: [D], of `load_channels`."""
    layout: gl.constexpr = rows_layout(ROWS, D)
    row = skipped + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    at = (head * rows + row)[:, None] * D + order.to(gl.int32)[None, :]
    return gl.load(query_ptr + at, mask=(row < rows)[:, None], other=0.0).to(gl.float32)


@gluon.jit
def load_channels_of(ptr, order):
    """`load_channels` in this order."""
    return gl.load(ptr + order.to(gl.int32))


@gluon.jit
def _sums_and_differences(y, BIT: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr):
    """y [ROWS, D] with pairs of channels that differ in BIT, and lie in one lane, added and subtracted."""
    pairs = y.reshape([ROWS, D // (2 * BIT), 2, BIT]).permute([0, 1, 3, 2])
    a, b = gl.split(pairs)
    y = gl.join(a + b, a - b).permute([0, 1, 3, 2]).reshape([ROWS, D])
    return gl.convert_layout(y, rows_layout(ROWS, D), assert_trivial=True)


@gluon.jit
def _of_other_lane(y, BIT: gl.constexpr):
    """y of the lane whose number differs in BIT."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;",
        "=f,f,r",
        [y, BIT],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _transformed(y, ROWS: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr):
    """The Walsh-Hadamard transform of each row, without its factor; of each half of it if GROUPS is 2."""
    y = _sums_and_differences(y, 1, ROWS, D)
    if D > 64:
        y = _sums_and_differences(y, 2, ROWS, D)
    if D > 128:
        y = _sums_and_differences(y, 4, ROWS, D)
    lane = gl.arange(0, D, layout=gl.SliceLayout(0, rows_layout(ROWS, D))) // (D // 32)
    for bit in gl.static_range(5 if GROUPS == 1 else 4):
        sign = gl.where((lane >> bit) % 2 == 1, -1.0, 1.0)
        y = y * sign[None, :] + _of_other_lane(y, 1 << bit)
    return y


@gluon.jit
def turned_queries(
    x,
    weight,
    mean,
    signs,
    scale,
    unit,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    HAS_WEIGHT: gl.constexpr,
    HAS_MEAN: gl.constexpr,
):
    """Queries as whole numbers of 16 bits, as `prepare_kernel` makes them, up to the last bit.

    x: [ROWS, D] of `load_rows`; weight, mean, signs: [D] of `load_channels`, the first two if HAS_WEIGHT and
    HAS_MEAN, signs times the rotation's factor; scale: on q.k in units of log 2; unit: of the codebook.

    Returns bytes [2 ROWS, D] int8, high parts in rows 2 r and low parts in rows 2 r + 1; what sums over bytes
    lack [ROWS] int32; the factor on scores and q . mean [ROWS] float32, of each row.
    """
    y = x * signs[None, :]
    if HAS_WEIGHT:
        y = y * (1.0 / weight)[None, :]
    y = _transformed(y, ROWS, D, 1)
    bits = gl.abs(y).to(gl.int32, bitcast=True)  # in the same order, and a warp has an instruction for them
    largest = gl.maximum(gl.max(bits, 1).to(gl.float32, bitcast=True), 1e-30)
    n = (y * (MOST / largest)[:, None] + _WHOLE).to(gl.int32, bitcast=True) - _WHOLE_BITS
    high = (n + 128) >> 8
    both = gl.join(high.to(gl.int8), (n - 256 * high).to(gl.int8))  # [ROWS, D, 2]
    bias = 0.0 * largest
    if HAS_MEAN:
        bias = gl.sum(x * mean[None, :], 1) * scale
    factor = largest * (2.0 / MOST * scale * unit)
    return both.permute([0, 2, 1]).reshape([2 * ROWS, D]), gl.sum(n, 1) >> 1, factor, bias


@gluon.jit
def turned_groups(
    x,
    weight,
    mean,
    signs,
    scale,
    unit,
    ROWS: gl.constexpr,
    D: gl.constexpr,
    HAS_WEIGHT: gl.constexpr,
    HAS_MEAN: gl.constexpr,
):
    """`turned_queries` where each half of the channels has a rotation of its own, all in the same units.

    What sums over bytes lack comes twice, for either half; signs have the unit of the half's levels, too.
    """
    y = x * signs[None, :]
    if HAS_WEIGHT:
        y = y * (1.0 / weight)[None, :]
    turned, lacking, lacking2, factor = numbers_of_parts(_transformed(y, ROWS, D, 2), ROWS, D)
    bias = 0.0 * factor
    if HAS_MEAN:
        bias = gl.sum(x * mean[None, :], 1) * scale
    return turned, lacking, lacking2, factor * (scale * unit), bias


@gluon.jit
def numbers_of_parts(y, ROWS: gl.constexpr, D: gl.constexpr):
    """Queries in code space [ROWS, D] as whole numbers; the halves of D are for codes of their own.

    Returns bytes [2 ROWS, D] as `turned_queries`, what sums over bytes lack of either half, and the factor on
    scores.
    """
    largest = gl.maximum(gl.max(gl.abs(y), 1), 1e-30)
    n = (y * (MOST / largest)[:, None] + _WHOLE).to(gl.int32, bitcast=True) - _WHOLE_BITS
    high = (n + 128) >> 8
    both = gl.join(high.to(gl.int8), (n - 256 * high).to(gl.int8)).permute([0, 2, 1]).reshape([2 * ROWS, D])
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, rows_layout(ROWS, D)))
    first = gl.sum(gl.where((channel < D // 2)[None, :], n, 0), 1)
    return both, first >> 1, (gl.sum(n, 1) - first) >> 1, largest * (2.0 / MOST)


@gluon.constexpr_function
def _by_thread(ROWS):
    """[ROWS, 2, 2]: the numbers of rows t, t + 4, ... in the lanes 4 * g + t."""
    rows = [[4 << bit, 0, 0] for bit in range((ROWS // 4).bit_length() - 1)]
    lanes = [[1, 0, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 1, 0], *rows], lanes, [], [], [ROWS, 2, 2])


@gluon.jit
def numbers_of_rows(lacking, factor, bias, ROWS: gl.constexpr):
    """From all lanes to those of the scores, in one exchange.

    lacking, factor, bias: [ROWS], of `turned_queries`. Returns what sums over bytes begin with [2 ROWS],
    0 in even places; factor; bias. The 0 comes with the others: a constant would be copied for each product.
    """
    begin = gl.join(0 * lacking, lacking).to(gl.float32, bitcast=True)
    every = gl.join(gl.join(factor, bias), begin)
    scales, begin = gl.split(gl.convert_layout(every, _by_thread(ROWS)))
    factor, bias = gl.split(scales)
    return begin.to(gl.int32, bitcast=True).reshape([2 * ROWS]), factor, bias


@gluon.jit
def query_operand(x, R: gl.constexpr, D: gl.constexpr, mma: gl.constexpr):
    """Bytes [2 R, D] as the right operand of the scores, [D, 2 R], channels as `key_operand` has them."""
    held = gl.allocate_shared_memory(gl.int8, [2 * R, D], gl.SwizzledSharedLayout(16, 1, 1, [1, 0]))
    held.store(x)
    return _operand(held, R, D, mma)


@gluon.jit
def query_operands(x, R: gl.constexpr, D: gl.constexpr, mma: gl.constexpr):
    """`query_operand` of each half of the channels."""
    held = gl.allocate_shared_memory(gl.int8, [2 * R, D], gl.SwizzledSharedLayout(16, 1, 1, [1, 0]))
    held.store(x)
    first, second = held.slice(0, D // 2, 1), held.slice(D // 2, D // 2, 1)
    return _operand(first, R, D // 2, mma), _operand(second, R, D // 2, mma)


@gluon.jit
def _operand(held, R: gl.constexpr, D: gl.constexpr, mma: gl.constexpr):
    x = held.load(gl.BlockedLayout([1, 16], [8, 4], [1, 1], [1, 0]))
    x = x.reshape([2 * R, D // 64, 4, 2, 2, 4])  # r | v t u h i
    x = x.permute([1, 3, 4, 2, 5, 0]).reshape([D, 2 * R])
    return gl.convert_layout(x, gl.DotOperandLayout(1, mma, 4), assert_trivial=True)
