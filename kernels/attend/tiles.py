"""Scores and weights of tiles of 32 tokens, in the layouts of the products (Gluon; see `split_mma`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from quantpress.kernels.attend.words import key_operand, value_operand

MOST = gl.constexpr(32512.0)
"""Weights are whole numbers, in units of the largest weight over this: their high byte stays below 128."""

_SPLIT = gl.constexpr("""{ .reg .f32 a, b, c, d; .reg .b32 u, v, w, x;
add.f32 a, $2, 0f4B400080;
add.f32 b, $3, 0f4B400080;
add.f32 c, $4, 0f4B400080;
add.f32 d, $5, 0f4B400080;
mov.b32 u, a;
mov.b32 v, b;
mov.b32 w, c;
mov.b32 x, d;
prmt.b32 u, u, v, 0x5140;
prmt.b32 w, w, x, 0x5140;
prmt.b32 v, u, w, 0x5410;
prmt.b32 $0, u, w, 0x7632;
xor.b32 $1, v, 0x80808080; }""")
"""Four weights n to their high and low bytes, n = 256 * high + low with low from -128 to 127.

Adding 1.5 * 2 ** 23 + 128 leaves n + 128 in the low bits of a float32."""


@gluon.jit
def load_scales(ptr, step, HALVES: gl.constexpr):
    """Scales of the tokens of a page [128] or half a page [64], in the order that `scales_of_tiles` takes."""
    if HALVES == 2:
        half: gl.constexpr = gl.DistributedLinearLayout(
            [[1], [2], [16], [32]], [[4], [8], [0], [0], [0]], [], [], [64]
        )
        at = gl.arange(0, 64, layout=half)
        x = gl.load(ptr + step % 2 * 16 + at // 16 * 32 + at % 16)
    else:
        whole: gl.constexpr = gl.DistributedLinearLayout(
            [[1], [2], [16], [32], [64]], [[4], [8], [0], [0], [0]], [], [], [128]
        )
        x = gl.load(ptr + gl.arange(0, 128, layout=whole))
    return x


@gluon.jit
def scales_of_tiles(x, HALVES: gl.constexpr):
    """[64 or 128] -> [32] of each tile j: token 32 j + 16 x + 4 n + 2 b + e, column 16 x + 8 b + 2 n + e."""
    x = x.to(gl.float32)
    if HALVES == 2:
        x = x.reshape([2, 2, 4, 2, 2]).permute([1, 3, 2, 4, 0])
        a, b = gl.split(x)
        c, d = a, b
    else:
        x = x.reshape([2, 2, 2, 4, 2, 2]).permute([2, 4, 3, 5, 0, 1])
        even, odd = gl.split(x)
        a, c = gl.split(even)
        b, d = gl.split(odd)
    return a.reshape([32]), b.reshape([32]), c.reshape([32]), d.reshape([32])


@gluon.jit
def high_and_low(x, R: gl.constexpr, N: gl.constexpr):
    """Take [2 R, N] apart into high parts (rows 16 m + r) and low parts (rows 16 m + 8 + r), [R, N] each."""
    high, low = gl.split(x.reshape([R // 8, 2, 8, N]).permute([0, 2, 3, 1]))
    return high.reshape([R, N]), low.reshape([R, N])


@gluon.jit
def sums_with_keys(q, k, start, R: gl.constexpr, D: gl.constexpr, mma: gl.constexpr):
    """sum_c (b + 1 / 2) q, [R, 32] float32, of queries q [2 R, D] and bytes k; start: half the sum of q."""
    high, low = high_and_low(mma_v2(q, key_operand(k, D, mma), start), R, 32)
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def sums_with_signs(
    q0,
    q1,
    q2,
    k0,
    k1,
    k2,
    start,
    R: gl.constexpr,
    D: gl.constexpr,
    mma: gl.constexpr,
    PLANES: gl.constexpr,
):
    """The same over PLANES bit planes, 1 to 3, with queries and bytes of their own each."""
    x = mma_v2(q0, key_operand(k0, D, mma), start)
    if PLANES > 1:
        x = mma_v2(q1, key_operand(k1, D, mma), x)
    if PLANES > 2:
        x = mma_v2(q2, key_operand(k2, D, mma), x)
    high, low = high_and_low(x, R, 32)
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def weighted_sums(
    w0,
    w1,
    w2,
    w3,
    v0,
    v1,
    v2,
    v3,
    R: gl.constexpr,
    DV: gl.constexpr,
    mma: gl.constexpr,
    HALVES: gl.constexpr,
):
    """sum_t n b, [R, DV] float32, of weights as operands, n whole numbers, and bytes b of tiles."""
    o = gl.full([2 * R, DV], 0, gl.int32, mma)
    o = mma_v2(w0, value_operand(v0, DV, mma), o)
    o = mma_v2(w1, value_operand(v1, DV, mma), o)
    if HALVES == 1:
        o = mma_v2(w2, value_operand(v2, DV, mma), o)
        o = mma_v2(w3, value_operand(v3, DV, mma), o)
    high, low = high_and_low(o, R, DV)
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def scaled(x, scales):
    """x [R, 32] times the scale of each column, scales [32]."""
    return x * gl.convert_layout(scales, gl.SliceLayout(0, x.type.layout), assert_trivial=True)[None, :]


@gluon.jit
def with_sink(x, scales, score):
    """x [R, 32] with score [R] in the column whose scale is negative."""
    columns = gl.convert_layout(scales, gl.SliceLayout(0, x.type.layout), assert_trivial=True)
    return gl.where(columns[None, :] < 0, score[:, None], x)


@gluon.jit
def capped(s, factor, bias, softcap):
    """softcap * tanh(score / softcap)."""
    x = (s * factor + bias) / softcap
    e = gl.exp2(-2.8853900817779268 * gl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return softcap * gl.where(x < 0, -t, t)


@gluon.jit
def exp2(x):
    """2 ** x by one instruction."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def seen_or(x, token, first, end, other: gl.constexpr):
    """x [R, 32] where the column's token [32] lies in `first` to `end`, and `other` elsewhere."""
    return gl.where(((token >= first) & (token < end))[None, :], x, other)


@gluon.jit
def weigh(s, factor, top, vs):
    """p = exp2(factor * s - top), and p times the value scales vs [32]."""
    p = exp2(s * factor - top)
    return p, scaled(p, vs)


@gluon.jit
def weight_operand(w, scale, R: gl.constexpr, mma: gl.constexpr):
    """w * scale, [R, 32] float32 from 0 to 32512, as the left operand of the sum, [2 R, 32] int8."""
    high, low = gl.inline_asm_elementwise(
        _SPLIT, "=&r,=&r,f,f,f,f", [w * scale], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
    )
    x = gl.join(high, low).reshape([R // 8, 8, 2, 2, 4, 2, 2])  # m r x b n e part
    x = x.permute([0, 6, 1, 2, 4, 3, 5]).reshape([2 * R, 32])
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)
