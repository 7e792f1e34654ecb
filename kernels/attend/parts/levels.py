"""From packed words to float16 levels inside a kernel (Triton): by byte permutations, or one by one.

A level is two bytes. The layout of `quantpress.kernels.layout` puts the fields of four neighbouring values
where `prmt.b32` expects its selectors, so one permutation of a table finds four low bytes, and one four high
bytes. Levels are symmetric: at 4 bits the table has the positive ones, and at 1 bit one, and the sign of a
code becomes that of the level.
"""

import triton
import triton.language as tl

TILE = tl.constexpr(32)

LOOKUP = tl.constexpr("""{ .reg .b32 l, h, t;
prmt.b32 l, $6, $7, $4;
prmt.b32 h, $8, $9, $4;
and.b32 t, $5, 0x80808080;
xor.b32 h, h, t;
prmt.b32 t, l, h, 0x5140;
mov.b32 {$0, $1}, t;
prmt.b32 t, l, h, 0x7362;
mov.b32 {$2, $3}, t; }""")
"""Four selectors, signs in the upper bit of four bytes, and four registers of a table in; four levels out."""


@triton.jit
def rows_of_tile(begin, BITS: tl.constexpr, VALUES: tl.constexpr):
    """Parts and rows of TILE tokens of a page, or of quads for values: [N, 1], or one part for all."""
    R: tl.constexpr = 16 if BITS == 3 else 16 * BITS
    UNIT: tl.constexpr = 4 if VALUES else 1
    unit = tl.arange(0, TILE // UNIT)[:, None]
    if R >= TILE:
        part, row = begin // R, begin % R // UNIT + unit
    else:
        part, row = begin // R + unit // (R // UNIT), unit % (R // UNIT)
    return part, row


@triton.jit
def load_words(ptr, begin, C: tl.constexpr, CP: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr):
    """The words of TILE tokens of a page from `begin` on, a multiple of TILE: int32.

    ptr: the page's words; C: channels, CP: padded. Keys [TILE, CP / 4], values [TILE / 4, CP]. At 3 bits the
    fields of parts 6 and 7 are put together from the three planes.
    """
    R: tl.constexpr = 16 if BITS == 3 else 16 * BITS
    _, row = rows_of_tile(begin, BITS, VALUES)
    column = tl.arange(0, CP if VALUES else CP // 4)[None, :]
    if VALUES:
        at = row * C + column
    elif C % 64 == 0:
        at = column // 16 * (16 * R) + row * 16 + column % 16
    else:
        at = row * (C // 4) + column
    inside = (column < (C if VALUES else C // 4)) & (row >= 0)
    if BITS != 3:
        words = tl.load(ptr + at, mask=inside, other=0)
    elif begin < 96:
        words = tl.load(ptr + begin // 32 * (4 * C) + at, mask=inside, other=0)
    else:
        first = tl.load(ptr + at, mask=inside, other=0)
        second = tl.load(ptr + 4 * C + at, mask=inside, other=0)
        third = tl.load(ptr + 8 * C + at, mask=inside, other=0)
        words = ((first >> 3) & 0x11111111) | ((second >> 2) & 0x22222222) | ((third >> 1) & 0x44444444)
    return words


@triton.jit
def _fields(words, begin, BITS: tl.constexpr, VALUES: tl.constexpr):
    """Selectors in nibbles 0 to 3 of each word, and signs in bit 7 of each of its bytes."""
    part, _ = rows_of_tile(begin, BITS, VALUES)
    sign = words & 0
    if BITS == 4:
        picked, sign = (words >> (16 * part)) & 0x7777, words << (4 * part)
    elif BITS == 3:
        picked = (words >> (16 * (part % 2))) & 0x7777
    elif BITS == 2:
        picked = (words >> (16 * (part // 2) + 2 * (part % 2))) & 0x3333
    else:
        picked, sign = sign, words << part
    return picked, sign


@triton.jit
def _one(picked, sign, levels_ptr, lane: tl.constexpr, BITS: tl.constexpr):
    """The levels of one lane, without assembly."""
    FIRST: tl.constexpr = 8 if BITS == 4 else (1 if BITS == 1 else 0)
    level = tl.load(levels_ptr + FIRST + ((picked >> (4 * lane)) & 7))
    return tl.where(((sign >> (8 * lane + 7)) & 1) == 1, -level, level)


@triton.jit
def _lanes(
    words, begin, levels_ptr, table_ptr, BITS: tl.constexpr, VALUES: tl.constexpr, PLAIN: tl.constexpr
):
    """The levels of the four lanes of each word: four float16 tiles."""
    if BITS == 8:
        a = tl.load(levels_ptr + (words & 255))
        b = tl.load(levels_ptr + ((words >> 8) & 255))
        c = tl.load(levels_ptr + ((words >> 16) & 255))
        d = tl.load(levels_ptr + ((words >> 24) & 255))
    else:
        picked, sign = _fields(words, begin, BITS, VALUES)
        if PLAIN:
            a, b = _one(picked, sign, levels_ptr, 0, BITS), _one(picked, sign, levels_ptr, 1, BITS)
            c, d = _one(picked, sign, levels_ptr, 2, BITS), _one(picked, sign, levels_ptr, 3, BITS)
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                LOOKUP,
                "=h,=h,=h,=h,r,r,r,r,r,r",
                [
                    picked,
                    sign,
                    tl.load(table_ptr),
                    tl.load(table_ptr + 1),
                    tl.load(table_ptr + 2),
                    tl.load(table_ptr + 3),
                ],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=1,
            )
    return a, b, c, d


@triton.jit
def key_tile(a, b, c, d, CP: tl.constexpr):
    """[TILE, CP] from what words of keys hold in their four lanes, each [TILE, CP / 4]."""
    levels = tl.join(tl.join(a, c), tl.join(b, d))  # [TILE, CP / 4, upper bit of the lane, lower bit]
    return tl.reshape(levels, [TILE, CP])


@triton.jit
def value_tile(a, b, c, d, CP: tl.constexpr):
    """[CP, TILE] from what words of values hold in their four lanes, each [TILE / 4, CP]."""
    levels = tl.join(tl.join(a, c), tl.join(b, d))  # [TILE / 4, CP, upper bit, lower bit]
    return tl.reshape(tl.permute(levels, [1, 0, 2, 3]), [CP, TILE])


@triton.jit
def key_levels(
    words, begin, levels_ptr, table_ptr, CP: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr
):
    """Levels [TILE, CP] float16 of the words of keys; of any code beyond the channels that there are.

    levels_ptr, table_ptr: a row of each of `level_rows`; PLAIN: for Triton's interpreter.
    """
    a, b, c, d = _lanes(words, begin, levels_ptr, table_ptr, BITS, False, PLAIN)
    return key_tile(a, b, c, d, CP)


@triton.jit
def value_levels(
    words, begin, levels_ptr, table_ptr, CP: tl.constexpr, BITS: tl.constexpr, PLAIN: tl.constexpr
):
    """Levels [CP, TILE] float16 of the words of values, as `key_levels`."""
    a, b, c, d = _lanes(words, begin, levels_ptr, table_ptr, BITS, True, PLAIN)
    return value_tile(a, b, c, d, CP)
