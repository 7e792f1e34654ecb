"""PTX for the Hopper encode kernel: eight coordinates at a time, from float32 to a packed word.

A thread holds two rows of the product and four columns of each: y[h][i]. Their fields are found thus:

    2 bits        thresholds are evenly spaced: the code is three times a clamped multiply-add, rounded. An
                  addition of 2**23 leaves it in the low bits, which `prmt` takes as the index of the level
    3 and 4 bits  by `byte_rounding`, the four columns of a row in the bytes of a word. Levels are looked up
                  four at a time, too

At 3 and 4 bits coordinates become whole numbers by what a product with them is rounded to: keys as multiples
of float16's smallest number, values, several steps a unit, as multiples of float32's. Sums of values with
levels are then of whole numbers, and scales good to 2**-15.
"""

from functools import lru_cache

import numpy as np

from quantpress.kernels.encode.assembly import float_bits, hex_float
from quantpress.kernels.encode.rounding import ByteRounding, byte_rounding
from quantpress.quantization.codebook import Codebook
from quantpress.quantization.density import CoordinateDensity

FACTOR = 2.0**64
"""Factor on coordinates of values at 2 bits: levels are read as level * 2**-149, products must be normal."""

STEP_BITS = {2: 0, 3: 5, 4: 6}
"""Powers of two: a unit has so many steps, which coordinates of values are rounded to. 16 bits hold 1."""

GATHER_CONSTRAINTS = "=&r,=&r,=&r,=&r,r,r,r,r"

_MAGIC = 2.0**23 + 0x9990
"""The last four bits take the field; `prmt` then picks one byte and the sign of another, which has none."""

_TINY16 = 2.0**-24  # the smallest number of float16
_TINY32 = 2.0**-149
_HALF = 0.5 - 2.0**-25  # a coordinate of 0 takes the lower code
_UPPER = 0xE0E0E0E0  # three bits of each byte
_NIBBLES = (
    2**27 + 2**15
)  # the upper half of a product with it has those of bytes 0, 2, 1, 3 as nibbles 0 to 3


@lru_cache(maxsize=64)
def octet_assembly(book: Codebook, values: bool) -> str:
    """PTX that rounds eight coordinates and joins their fields.

    Args:
        book: an int8 codebook of 2, 3 or 4 bits for head_dim 128.
        values: whether the vectors are values, not keys.

    Returns:
        Assembly. Inputs: y[0][0 to 3] and y[1][0 to 3]; for each row `steepness` over the vector's norm; the
        `zero_fields` of zero vectors, joined; the words of `octet_table`, at 2 bits the first one only.
        Outputs: the word, with the nibble of y[h][i] at bit 8 i + 4 h (values) or 16 h + 4 i (keys); for each
        row the sum over i of level**2 (keys), of |y| FACTOR level 2**-149 (values at 2 bits), or of level
        times |u| in steps, rounded down (values), with levels in units of the codebook's.
    """
    lines = _added_fields(book, values) if book.bits == 2 else _byte_fields(book, values)
    names = "b, c, d, e, g, g0, g1, f0, f1, m, n, q0, q1, s0, s1, t, v, w, A, B, y0, y1, y2, y3"
    return "{ .reg .b32 " + names + ";\n" + "\n".join(lines) + "\n}"


def octet_constraints(book: Codebook, values: bool) -> str:
    """Register constraints of `octet_assembly`."""
    sums = ",=&f,=&f" if values and book.bits == 2 else ",=&r,=&r"
    return "=&r" + sums + ",f" * 10 + ",r" * 6


def steepness(book: Codebook, values: bool) -> tuple[float, float]:
    """What one over a vector's norm is multiplied by before it goes into `octet_assembly`.

    By one after the other: float32 would hold few bits of the product of the two.
    """
    if book.bits == 2:
        return 1 / (3 * book.thresholds[-1]), 1.0
    return (2.0 ** STEP_BITS[book.bits] / book.unit, _TINY32) if values else (_TINY16 / book.unit, 1.0)


def sum_unit(book: Codebook, values: bool) -> float:
    """What the sums over rows stand for, times one over the vector's norm for values at 3 and 4 bits."""
    if not values:
        return book.unit**2
    if book.bits == 2:
        return book.unit / _TINY32 / FACTOR
    half, density = len(book.levels) // 2, CoordinateDensity(book.head_dim)
    levels, low = np.array(book.scaled[half:]), np.array(book.thresholds[half - 1 :])
    high = np.array((*book.thresholds[half:], 1.0))
    lost = 0.5 * (levels * density.mass(low, high)).sum() / (levels * density.first_moment(low, high)).sum()
    steps = 1 << STEP_BITS[book.bits]
    return book.unit**2 / steps * float(1 + lost * book.unit / steps)  # half a step is lost by rounding down


def octet_table(book: Codebook, values: bool) -> list[int]:
    """[5] int32: levels as bytes of two words, what `byte_rounding` adds in cells likewise, its offset twice.

    Levels are looked up by code, at 4 bits by magnitude.
    """
    levels = [abs(int(level)) for level in book.scaled]
    levels = levels[len(levels) // 2 :] if book.bits == 4 else (levels + [0] * 8)[:8]
    by = byte_rounding(book) if book.bits > 2 else ByteRounding(0, (0,) * 8)
    both = (*levels, *by.added)
    words = [sum(byte << (8 * i) for i, byte in enumerate(both[at : at + 4])) for at in (0, 4, 8, 12)]
    return [*map(_signed, words), (by.offset << _step_bits(book, values)) * 0x10001]


def zero_fields(bits: int, values: bool) -> tuple[int, int]:
    """The bits of a word that row 0 and row 1 have, which zero vectors get from elsewhere."""
    if bits == 2:  # rounded as they should be
        return 0, 0
    first, second = (0x0F0F0F0F, 0xF0F0F0F0) if values else (0x0000FFFF, 0xFFFF0000)
    if bits == 4:  # signs are elsewhere
        first, second = first & 0x77777777 | 0x80808080, second & 0x77777777 | 0x08080808
    return _signed(first), _signed(second)


@lru_cache(maxsize=64)
def gather_assembly(bits: int) -> str:
    """PTX that transposes words of lanes 0 to 3, with column c in byte c, into words of columns 0 to 3.

    The field of lane l and row h goes to bit 4 l + 16 h. Signs of 4 bits go to byte l.
    """
    lines = ["shl.b32 a, $5, 4;", "lop3.b32 A, $4, a, 0x0f0f0f0f, 0xE4;"]
    lines += ["shl.b32 a, $7, 4;", "lop3.b32 B, $6, a, 0x0f0f0f0f, 0xE4;"]
    lines += ["shr.u32 a, $4, 4;", "lop3.b32 C, a, $5, 0x0f0f0f0f, 0xE4;"]
    lines += ["shr.u32 a, $6, 4;", "lop3.b32 D, a, $7, 0x0f0f0f0f, 0xE4;"]
    if bits == 4:
        lines += [f"lop3.b32 {name}, {name}, ${4 + i}, 0x77777777, 0xE4;" for i, name in enumerate("ABCD")]
    lines += ["prmt.b32 a, A, B, 0x5140;", "prmt.b32 b, C, D, 0x5140;"]
    lines += ["prmt.b32 $0, a, b, 0x5410;", "prmt.b32 $1, a, b, 0x7632;"]
    lines += ["prmt.b32 a, A, B, 0x7362;", "prmt.b32 b, C, D, 0x7362;"]
    lines += ["prmt.b32 $2, a, b, 0x5410;", "prmt.b32 $3, a, b, 0x7632;"]
    return "{ .reg .b32 a, b, A, B, C, D;\n" + "\n".join(lines) + "\n}"


def _input(row: int, column: int) -> str:
    return f"${3 + 4 * row + column}"


def _added_fields(book: Codebook, values: bool) -> list[str]:
    """The fields of 2 bits, rounded by addition one by one, and their sums."""
    lines, surplus = ["mov.b32 c, $14;"], 0  # inputs: constants would be copied at each use
    for row in range(2):
        for column in range(4):
            y = _input(row, column)
            lines.append(f"fma.rn.sat.f32 b, {y}, ${11 + row}, {hex_float(_HALF)};")
            lines.append(f"fma.rn.f32 v, b, {hex_float(3)}, {hex_float(_MAGIC)};")
            if values:
                lines += [f"abs.f32 m, {y};", f"mul.f32 m, m, {hex_float(FACTOR)};"]
                lines.append("prmt.b32 t, c, c, v;")
                lines.append(f"fma.rn.f32 q{row}, m, t, q{row};" if column else f"mul.rn.f32 q{row}, m, t;")
            shift = 8 * column + 4 * row if values else 16 * row + 4 * column
            surplus += float_bits(_MAGIC) << shift
            lines += [f"shl.b32 m, v, {shift};", "add.u32 w, w, m;"] if shift else ["mov.b32 w, v;"]
    lines += [f"add.u32 w, w, {-surplus & 0xFFFFFFFF:#x};", "mov.b32 $0, w;"]
    if values:
        return [*lines, "mov.b32 $1, q0;", "mov.b32 $2, q1;"]
    for row in range(2):
        lines += [f"shr.u32 m, w, {16 * row};", "prmt.b32 t, c, c, m;", f"dp4a.u32.u32 ${1 + row}, t, t, 0;"]
    return lines


def _byte_fields(book: Codebook, values: bool) -> list[str]:
    """The fields of 3 and 4 bits in bytes, the word, and the sums.

    Half words hold two columns, A and B; `n` has a byte for each column; upper three bits of `e` are fields.
    """
    steps = _step_bits(book, values)
    first, second = ((0, 2), (1, 3)) if values else ((0, 1), (2, 3))  # columns of A and B: low, high
    offset = byte_rounding(book).offset
    most = ((256 << steps) - 1) if values else 255 - offset
    lines = [f"mov.b32 b, {most * 0x10001:#x};"]
    for row in range(2):
        for column in range(4):
            if values:
                lines.append(f"abs.f32 y{column}, {_input(row, column)};")
                lines.append(f"mul.rz.f32 y{column}, y{column}, ${11 + row};")
            else:
                lines.append(f"mul.rn.f32 y{column}, {_input(row, column)}, ${11 + row};")
        for half, (low, high) in (("A", first), ("B", second)):
            if values:
                lines.append(f"mad.lo.u32 {half}, y{high}, 65536, y{low};")
            else:
                lines.append(f"cvt.rz.f16x2.f32 {half}, y{high}, y{low};")
        for half, cell in (("A", "m"), ("B", "n")):
            if values:
                lines += [f"add.u16x2 {cell}, {half}, $18;", f"min.u16x2 {cell}, {cell}, b;"]
            else:
                lines += [f"abs.f16x2 {cell}, {half};", f"min.f16x2 {cell}, {cell}, b;"]
        if values:
            lines += [f"shl.b32 {cell}, {cell}, {8 - steps};" for cell in "mn"]
            lines.append("prmt.b32 n, m, n, 0x7351;")
        else:
            lines += ["shl.b32 n, n, 8;", "add.u32 n, n, m;"]
            if offset:
                lines.append(f"add.u32 n, n, {offset * 0x01010101:#x};")
        lines += [
            f"and.b32 c, n, {_UPPER:#x};",
            f"mul.hi.u32 c, c, {_NIBBLES:#x};",
            "prmt.b32 d, $16, $17, c;",
        ]
        lines += ["prmt.b32 d, d, d, 0x3120;", "add.u32 e, n, d;"]
        if book.bits == 3:
            numbers = [_input(row, i) for i in range(4)]
            lines += _sign_bytes("g", numbers) if values else ["prmt.b32 g, A, B, 0xfbd9;"]
            lines.append(f"lop3.b32 e, e, g, {_UPPER:#x}, 0x28;")  # (e ^ g) & upper
        else:
            lines.append(f"and.b32 e, e, {_UPPER:#x};")
            if not values:
                lines.append(f"prmt.b32 g{row}, A, B, 0xfdb9;")
        lines += [f"mul.hi.u32 f{row}, e, {_NIBBLES:#x};", f"prmt.b32 t, $14, $15, f{row};"]
        if values:
            lines.append(f"shr.u32 f{row}, e, {1 if row else 5};")
            lines += ["dp2a.lo.u32.u32 g, A, t, 0;", f"dp2a.hi.u32.u32 s{row}, B, t, g;"]
        else:
            lines.append(f"dp4a.u32.u32 s{row}, t, t, 0;")
    lines.append("add.u32 w, f0, f1;" if values else "prmt.b32 w, f0, f1, 0x5410;")
    if book.bits == 4:
        for row in range(2 * values):
            lines += _sign_bytes(f"g{row}", [_input(row, i) for i in range(4)])
        lines.append("lop3.b32 A, g0, g1, 0xf0f0f0f0, 0xE4;")  # A where the mask is set, else B
        lines.append("lop3.b32 w, A, 0x88888888, w, 0xEA;")  # (A & mask) | w
    zeros = 0x88888888 if book.bits == 4 else 0x33333333
    lines.append(f"lop3.b32 $0, w, $13, {zeros:#x}, 0xB8;")  # zeros where $13 is set, else w
    return [*lines, "mov.b32 $1, s0;", "mov.b32 $2, s1;"]


def _sign_bytes(out: str, numbers: list[str]) -> list[str]:
    """Byte i is 0xFF where number i is negative."""
    a, b, c, d = numbers
    lines = [f"prmt.b32 {out}, {a}, {b}, 0x00fb;", f"prmt.b32 {out}, {out}, {c}, 0x0f10;"]
    return [*lines, f"prmt.b32 {out}, {out}, {d}, 0xf210;"]


def _step_bits(book: Codebook, values: bool) -> int:
    return STEP_BITS[book.bits] if values else 0


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
