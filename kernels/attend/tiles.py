"""Scores and weights of tiles of 32 tokens, in the layouts of the products (Gluon; see `split_mma`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from quantpress.kernels.attend.words import key_operand, value_operand

MOST = gl.constexpr(32512.0)
"""Weights are whole numbers, in units of the largest weight over this: their high byte stays below 128."""

_WEIGHTS = gl.constexpr("""{ .reg .f32 a, b, c, d; .reg .b32 u, v, w, x;
add.f32 a, $2, 0f4B400080;
add.f32 b, $3, 0f4B400080;
add.f32 c, $4, 0f4B400080;
add.f32 d, $5, 0f4B400080;
mov.b32 u, a;
mov.b32 v, b;
mov.b32 w, c;
mov.b32 x, d;
prmt.b32 u, u, v, 0x4051;
prmt.b32 w, w, x, 0x4051;
xor.b32 u, u, 0x80800000;
xor.b32 w, w, 0x80800000;
movmatrix.sync.aligned.m8n8.trans.b16 u, u;
movmatrix.sync.aligned.m8n8.trans.b16 w, w;
prmt.b32 $0, u, u, 0x3120;
prmt.b32 $1, w, w, 0x3120; }""")
"""Four weights n of a lane, two of each group of 16 tokens, to bytes of the right operand.

n = 256 * high + low with low from -128 to 127: adding 1.5 * 2 ** 23 + 128 leaves n + 128 in the low bits of a
float32. The lane of token g and row t hands two high bytes and two low ones on to where the product wants
them: to lanes 4 * (2 t) + g // 2 and 4 * (2 t + 1) + g // 2."""


@gluon.jit
def load_scales(ptr, step, HALVES: gl.constexpr):
    """Scales of the tokens of a page [128] or half a page [64], in the order that `scales_of_tiles` takes."""
    if HALVES == 2:
        half: gl.constexpr = gl.DistributedLinearLayout(
            [[2], [16], [32]], [[0], [0], [1], [4], [8]], [], [], [64]
        )
        at = gl.arange(0, 64, layout=half)
        x = gl.load(ptr + step % 2 * 16 + at // 16 * 32 + at % 16)
    else:
        whole: gl.constexpr = gl.DistributedLinearLayout(
            [[2], [16], [32], [64]], [[0], [0], [1], [4], [8]], [], [], [128]
        )
        x = gl.load(ptr + gl.arange(0, 128, layout=whole))
    return x


@gluon.jit
def scales_of_tiles(x, HALVES: gl.constexpr):
    """[64 or 128] -> [32] of each tile j: token 32 j + 16 x + 4 n + 2 b + e, row 16 x + 8 b + 2 n + e."""
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
def high_and_low(x, N: gl.constexpr, R: gl.constexpr):
    """Take [N, 2 R] apart into high parts (columns 2 r) and low parts (columns 2 r + 1), [N, R] each."""
    return gl.split(x.reshape([N, R, 2]))


@gluon.jit
def _joined(x, N: gl.constexpr, R: gl.constexpr):
    high, low = high_and_low(x, N, R)
    return (high * 256 + low).to(gl.float32)


@gluon.jit
def sums_with_keys(q, k, start, R: gl.constexpr, D: gl.constexpr, mma: gl.constexpr):
    """sum_c (b + 1 / 2) q, [32, R] float32, of bytes k and queries q [D, 2 R]; start: half the sum of q."""
    return _joined(mma_v2(key_operand(k, D, mma), q, start), 32, R)


@gluon.jit
def sums_with_signs(
    q0,
    q1,
    q2,
    q3,
    k0,
    k1,
    k2,
    k3,
    start,
    R: gl.constexpr,
    D: gl.constexpr,
    mma: gl.constexpr,
    PLANES: gl.constexpr,
):
    """The same over PLANES bit planes, 1 to 4, with queries and bytes of their own each."""
    x = mma_v2(key_operand(k0, D, mma), q0, start)
    if PLANES > 1:
        x = mma_v2(key_operand(k1, D, mma), q1, x)
    if PLANES > 2:
        x = mma_v2(key_operand(k2, D, mma), q2, x)
    if PLANES > 3:
        x = mma_v2(key_operand(k3, D, mma), q3, x)
    return _joined(x, 32, R)


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
    """sum_t n b, [DV, R] float32, of weights as operands, n whole numbers, and bytes b of tiles."""
    o = gl.full([DV, 2 * R], 0, gl.int32, mma)
    o = mma_v2(value_operand(v0, DV, mma), w0, o)
    o = mma_v2(value_operand(v1, DV, mma), w1, o)
    if HALVES == 1:
        o = mma_v2(value_operand(v2, DV, mma), w2, o)
        o = mma_v2(value_operand(v3, DV, mma), w3, o)
    return _joined(o, DV, R)


@gluon.jit
def of_tokens(x, like):
    """x [32], one of each token, as a column beside `like` [32, R]."""
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def of_rows(x, like):
    """x [R], one of each row, as a row over `like` [N, R]."""
    return gl.convert_layout(x, gl.SliceLayout(0, like.type.layout), assert_trivial=True)[None, :]


@gluon.jit
def sums_of_lanes(x, R: gl.constexpr):
    """[32, R] -> [8, R]: what each lane holds, summed up."""
    return gl.sum(x.reshape([4, 8, R]), 0)


@gluon.jit
def with_sink(x, scales, score):
    """x [32, R] with score [R] in the row whose scale is negative."""
    return gl.where(of_tokens(scales, x) < 0, score[None, :], x)


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
    """x [32, R] where the token [32] lies in `first` to `end`, and `other` elsewhere."""
    return gl.where(((token >= first) & (token < end))[:, None], x, other)


@gluon.jit
def weigh(s, factor, top, vs):
    """p = exp2(factor * s - top), and p times the value scales vs [32]; factor, top: [1, R]."""
    p = exp2(s * factor - top)
    return p, p * of_tokens(vs, p)


@gluon.jit
def weight_operand(w, R: gl.constexpr, mma: gl.constexpr):
    """Weights [32, R] float32, from 0 to 32512, as the right operand of the sum, [32, 2 R] int8."""
    lanes: gl.constexpr = gl.BlockedLayout([R // 4, 1, 4], [1, 32, 1], [1, 1, 1], [2, 1, 0])
    x = w.reshape([2, 2, 8, R // 4, 4]).permute([3, 2, 4, 0, 1]).reshape([R // 4, 32, 4])  # x b g m t
    first, second = gl.inline_asm_elementwise(
        _WEIGHTS,
        "=&r,=&r,f,f,f,f",
        [gl.convert_layout(x, lanes, assert_trivial=True)],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )
    x = gl.join(first, second).reshape([R // 4, 8, 4, 4, 2])  # m g t i h
    x = x.permute([4, 2, 3, 0, 1]).reshape([32, 2 * R])
    return gl.convert_layout(x, gl.DotOperandLayout(1, mma, 4), assert_trivial=True)
