# mypy: allow-untyped-defs
"""Words of the Hopper encode kernel: from eight coordinates a word to where a page has them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpress.kernels.encode.hopper_product import token_of
from quantpress.kernels.gluon_index import index_along


@gluon.constexpr_function
def _gathered_layout():
    """[w 4, g // 4 2, o % 4 4, o // 4 2, g % 4 4, t 4] with o in registers, t and g in lanes, w in warps."""
    unit = [[n if k == dim else 0 for k in range(6)] for dim, n in ((2, 1), (2, 2), (3, 1))]
    lane = [[n if k == dim else 0 for k in range(6)] for dim, n in ((5, 1), (5, 2), (4, 1), (4, 2), (1, 1))]
    warp = [[n if k == dim else 0 for k in range(6)] for dim, n in ((0, 1), (0, 2))]
    return gl.DistributedLinearLayout(unit, lane, warp, [], [4, 2, 4, 2, 4, 4])


@gluon.constexpr_function
def _key_layout():
    """[w 4, g 8, block 2, t 4, word 4] with word and block in registers, t and g in lanes, w in warps."""
    unit = [[n if k == dim else 0 for k in range(5)] for dim, n in ((4, 1), (4, 2), (2, 1))]
    lane = [[n if k == dim else 0 for k in range(5)] for dim, n in ((3, 1), (3, 2), (1, 1), (1, 2), (1, 4))]
    warp = [[n if k == dim else 0 for k in range(5)] for dim, n in ((0, 1), (0, 2))]
    return gl.DistributedLinearLayout(unit, lane, warp, [], [4, 8, 2, 4, 4])


@gluon.jit
def store_scales(scale_ptr, flag_ptr, scale0, scale1, good, left, start, BITS: gl.constexpr):
    """Store the scales [w, g] of both rows of a thread, and set the flag where not `good`.

    left: pages from this one on; start: of `tile_start`.
    """
    layout: gl.constexpr = scale0.type.layout
    token = token_of(16 * index_along(0, 4, 2, layout) + index_along(1, 8, 2, layout), BITS) + start
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
    flat: gl.constexpr = _key_layout()
    words = gl.permute(gl.reshape(octets, [4, 8, 2, 4, 4]), [0, 1, 2, 4, 3])
    words = gl.convert_layout(words, flat, assert_trivial=True)  # in the order of a store of 16 bytes
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
def words_of(
    octets,
    left,
    GATHER: gl.constexpr,
    GATHER_REGISTERS: gl.constexpr,
    BITS: gl.constexpr,
    VALUES: gl.constexpr,
):
    """Words of a tile from those of octets [w, g, o, t], offsets in a page, whether their page is there."""
    if VALUES:
        words, at, there = _value_words(octets, left, GATHER, GATHER_REGISTERS, BITS)
    else:
        words, at, there = _key_words(octets, left, BITS)
    return words, at, there
