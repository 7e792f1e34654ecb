"""Packed words in registers to operands of int8 tensor cores (Gluon; see `split_mma`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpress.kernels.attend.lookup import LOOKUP_2, LOOKUP_3, LOOKUP_3_HALF, LOOKUP_4
from quantpress.kernels.attend.words import bytes_layout


@gluon.jit
def _repeat(words, VECTORS: gl.constexpr):
    """[VECTORS, 32, 4] -> [VECTORS, 32, 4, 4], the same register four times."""
    return words[:, :, :, None] + gl.full([VECTORS, 32, 4, 4], 0, gl.int32, bytes_layout(VECTORS))


@gluon.jit
def _register(tables, ROW: gl.constexpr, VECTORS: gl.constexpr):
    """One register of the lookup table, out of shared memory."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, bytes_layout(VECTORS))))
    return tables.index(ROW).load(layout)[None, :][:, :, None][:, :, :, None]


@gluon.jit
def _pair(a, b, VECTORS: gl.constexpr):
    """Two groups of 16 tokens -> a tile."""
    return gl.join(a, b).permute([4, 0, 1, 2, 3]).reshape([2 * VECTORS, 32, 4, 4])


@gluon.jit
def levels_of(
    a, b, c, step, tables, SIDE: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, HALVES: gl.constexpr
):
    """int8 levels of the tiles: [D / 16, 32, 4, 4] each; four of a page, two (twice) of a half."""
    N: gl.constexpr = D // 16 if BITS == 4 or (BITS == 2 and HALVES == 1) else D // 32
    low = _register(tables, 2 * SIDE, N)
    if BITS != 2:
        high = _register(tables, 2 * SIDE + 1, N)
    if BITS == 4:
        w, x = gl.inline_asm_elementwise(
            LOOKUP_4,
            "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), low, high],
            dtype=(gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        if HALVES == 2:
            y, z = w, x
        else:
            y = x
            x, z = gl.inline_asm_elementwise(
                LOOKUP_4,
                "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
                [_repeat(b, N), low, high],
                dtype=(gl.int8, gl.int8),
                is_pure=True,
                pack=4,
            )
    elif BITS == 3 and HALVES == 2:
        w0, w1, x0, x1 = gl.inline_asm_elementwise(
            LOOKUP_3_HALF,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), _repeat(b, N), _repeat(c, N), low, high, step % 2 * 16],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        w, x = _pair(w0, w1, N), _pair(x0, x1, N)
        y, z = w, x
    elif BITS == 3:
        w0, w1, x0, x1, y0, y1, z0, z1 = gl.inline_asm_elementwise(
            LOOKUP_3,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), _repeat(b, N), _repeat(c, N), low, high],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        w, x, y, z = _pair(w0, w1, N), _pair(x0, x1, N), _pair(y0, y1, N), _pair(z0, z1, N)
    else:
        w, x, y, z = gl.inline_asm_elementwise(
            LOOKUP_2,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), low],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        if HALVES == 2:
            w = _pair(w, x, N)
            x = _pair(y, z, N)
            y, z = w, x
    return w, x, y, z


@gluon.jit
def key_operand(levels, D: gl.constexpr, mma: gl.constexpr):
    """[D / 16, 32, 4, 4] int8 -> [D, 32], the right operand of the scores."""
    x = levels.reshape([2, 2, D // 64, 4, 2, 4, 2, 2, 4])  # x b v | n e t | u h i
    x = x.permute([2, 6, 7, 5, 8, 0, 1, 3, 4]).reshape([D, 32])
    return gl.convert_layout(x, gl.DotOperandLayout(1, mma, 4), assert_trivial=True)


@gluon.jit
def value_operand(levels, C: gl.constexpr, mma: gl.constexpr):
    """[C / 16, 32, 4, 4] int8 -> [32, C], the right operand of the sum."""
    x = levels.reshape([2, C // 32, 8, 4, 4, 4])  # h c | g t | u i
    x = x.permute([0, 3, 5, 1, 4, 2]).reshape([32, C])
    return gl.convert_layout(x, gl.DotOperandLayout(1, mma, 4), assert_trivial=True)
