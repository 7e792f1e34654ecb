"""PTX for the Hopper encode kernel: eight coordinates at a time, from float32 to a packed word.

A thread holds two rows of the product and four columns of each: y[h][i]. Their fields are found thus:

    2 bits        thresholds are evenly spaced: the code is three times a clamped multiply-add, rounded. An
                  addition of 2**23 leaves it in the low bits, which `prmt` takes as the index of the level
    3 and 4 bits  by `rounding`: two columns of a row go into a word as whole numbers of float16, of which
                  multiply-adds make fields. Two of a row's words add up to fields of four bits. Levels are
                  looked up four at a time

Values at 3 and 4 bits are whole numbers of steps in their sums with levels, several steps a unit: a
multiply-add with 2**23 leaves them in the low bits. Scales are then good to 2**-17 in the root mean square
over vectors; the worst of ten thousand had 2**-15.
"""

from functools import lru_cache

import numpy as np

from quantpress.kernels.encode.assembly import float_bits, hex_float
from quantpress.kernels.encode.rounding import rounding_of
from quantpress.quantization.codebook import Codebook
from quantpress.quantization.density import CoordinateDensity

FACTOR = 2.0**64
"""Factor on coordinates of values at 2 bits: levels are read as level * 2**-149, products must be normal."""

STEP_BITS = {2: 0, 3: 5, 4: 6}
"""Powers of two: a unit has so many steps, which values are rounded to in sums. 16 bits hold 1."""

GATHER_CONSTRAINTS = "=&r,=&r,=&r,=&r,r,r,r,r"

_MAGIC = 2.0**23 + 0x9990
"""The last four bits take the field; `prmt` then picks one byte and the sign of another, which has none."""

_WHOLE = 2.0**23
_TINY16 = 2.0**-24  # the smallest number of float16
_TINY32 = 2.0**-149
_HALF = 0.5 - 2.0**-25  # a coordinate of 0 takes the lower code
_PAIR = 0x645A6400
"""1114 and 1024 in float16. With 1114, byte 2 of b * 16 + a and of a * 16 + a has the fields alone."""


@lru_cache(maxsize=64)
def octet_assembly(book: Codebook, values: bool) -> str:
    """PTX that rounds eight coordinates and joins their fields.

    Args:
        book: an int8 codebook of 2, 3 or 4 bits for head_dim 128.
        values: whether the vectors are values, not keys.

    Returns:
        Assembly. Inputs: y[0][0 to 3] and y[1][0 to 3], at 3 and 4 bits times `steepness` over the vector's
        norm, plus `centre`; for each row `steepness` over the norm, used at 2 bits; the `zero_fields` of zero
        vectors, joined; the words of `octet_table`, at 2 bits the first one only. Outputs: the word, with the
        nibble of y[h][i] at bit 8 i + 4 h (values) or 16 h + 4 i (keys); for each row the sum over i of
        level**2 (keys), of |y| FACTOR level 2**-149 (values at 2 bits), or of level times |u| in steps,
        rounded down (values), with levels in units of the codebook's.
    """
    lines = _added_fields(book, values) if book.bits == 2 else _half_fields(book, values)
    names = (
        "a0, a1, b, b0, b1, c, d, e, f0, f1, g, g0, g1, k0, k1, k2, k3, m, n, q0, q1, s0, s1, t, v, v0, v1"
    )
    return "{ .reg .b32 " + names + ", w, x0, x1, y0, y1, y2, y3;\n" + "\n".join(lines) + "\n}"


def octet_constraints(book: Codebook, values: bool) -> str:
    """Register constraints of `octet_assembly`."""
    sums = ",=&f,=&f" if values and book.bits == 2 else ",=&r,=&r"
    return "=&r" + sums + ",f" * 10 + ",r" * 6


def steepness(book: Codebook, values: bool) -> float:
    """What one over a vector's norm is multiplied by before it goes into `octet_assembly`."""
    if book.bits == 2:
        return 1 / (3 * book.thresholds[-1])
    return (1.0 if rounding_of(book, values).centre else _TINY16) / book.unit


def centre(book: Codebook, values: bool) -> float:
    """What is added to the coordinates of 3 and 4 bits."""
    return rounding_of(book, values).centre if book.bits > 2 else 0.0


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
    """[5] int32: levels as bytes of two words, then two or three numbers of float16, each twice in a word.

    Levels are looked up by code, at 4 bits by magnitude.
    """
    levels = [abs(int(level)) for level in book.scaled]
    levels = levels[len(levels) // 2 :] if book.bits == 4 else (levels + [0] * 8)[:8]
    words = [sum(byte << (8 * i) for i, byte in enumerate(levels[at : at + 4])) for at in (0, 4)]
    held = rounding_of(book, values).held if book.bits > 2 else ()
    return [*map(_signed, words), *(_signed(_twice(x)) for x in (*held, 0.0, 0.0, 0.0)[:3])]


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


def _half_fields(book: Codebook, values: bool) -> list[str]:
    """The fields of 3 and 4 bits, the word, and the sums.

    Of row r, a{r} holds columns 0 and 2, b{r} columns 1 and 3; q{r} and x{r} have the steps of columns 0 and
    1 and of 2 and 3.
    """
    by = rounding_of(book, values)
    pair = _PAIR + 0x00040004 * (by.kind == "square")  # positive codes are 4 + magnitude
    lines = [f"mov.b32 k{i}, {_twice(x):#x};" for i, x in enumerate(by.written)]
    lines.append(f"mov.b32 k3, {pair:#x};")
    for row in range(2):
        y = [_input(row, i) for i in range(4)]
        if values:
            steps = hex_float(2.0 ** STEP_BITS[book.bits] / _TINY16)
            for i in range(4):
                lines.append(f"abs.f32 y{i}, {y[i]};")
                lines.append(f"fma.rz.f32 y{i}, y{i}, {steps}, {hex_float(_WHOLE)};")
            lines += [f"prmt.b32 q{row}, y0, y1, 0x5410;", f"prmt.b32 x{row}, y2, y3, 0x5410;"]
        near = "rn" if by.centre else "rz"
        lines += [f"cvt.{near}.f16x2.f32 v{i}, {y[2 + i]}, {y[i]};" for i in range(2)]
        if by.kind != "lines":
            lines.append(f"prmt.b32 g{row}, v0, v1, 0xfbd9;")  # byte i is 0xFF where column i is negative
        lines += _rounded(by.kind, "v0", f"a{row}") + _rounded(by.kind, "v1", f"b{row}")
        lines.append(f"mad.lo.u32 f{row}, b{row}, 16, a{row};")
    lines += ["prmt.b32 w, f0, f1, 0x6420;", "shr.u32 e, w, 16;"]  # the fields of row 0, of row 1
    for row, fields in enumerate("we"):
        lines.append(f"prmt.b32 t, $14, $15, {fields};")
        if values:
            lines += [f"dp2a.lo.u32.u32 g, q{row}, t, 0;", f"dp2a.hi.u32.u32 s{row}, x{row}, t, g;"]
        else:
            lines.append(f"dp4a.u32.u32 s{row}, t, t, 0;")
    if values:
        lines += ["mad.lo.u32 m, a1, 16, a0;", "mad.lo.u32 n, b1, 16, b0;", "prmt.b32 w, m, n, 0x6240;"]
    if by.kind == "cubic":
        lines.append("lop3.b32 g, g0, g1, 0xf0f0f0f0, 0xE4;")  # g0 where the mask is set, else g1
        lines.append("lop3.b32 w, g, 0x88888888, w, 0xEA;")  # (g & mask) | w
    if by.kind == "square":
        lines.append("lop3.b32 g, g0, g1, 0x0f0f0f0f, 0xE4;")
        lines.append("lop3.b32 w, g, 0x77777777, w, 0x6A;")  # (g & mask) ^ w
    zeros = 0x88888888 if book.bits == 4 else 0x33333333
    lines.append(f"lop3.b32 $0, w, $13, {zeros:#x}, 0xB8;")  # zeros where $13 is set, else w
    return [*lines, "mov.b32 $1, s0;", "mov.b32 $2, s1;"]


def _rounded(kind: str, number: str, out: str) -> list[str]:
    """`out` = the fields of two whole numbers, plus 1024 and 1114; see `rounding`."""
    if kind == "lines":
        lines = [f"fma.rn.sat.f16x2 m, {number}, $16, k0;", f"fma.rn.sat.f16x2 n, {number}, $17, k1;"]
        return [*lines, "fma.rn.f16x2 n, n, k2, m;", f"fma.rn.f16x2 {out}, n, $18, k3;"]
    lines = [f"abs.f16x2 m, {number};", "fma.rn.sat.f16x2 m, m, $16, k0;", "fma.rn.f16x2 n, $17, m, k1;"]
    lines += ["fma.rn.f16x2 n, n, m, k2;"] * (kind == "cubic")
    return [*lines, f"fma.rn.f16x2 {out}, n, m, k3;"]


def _twice(x: float) -> int:
    return int(np.float16(x).view(np.uint16)) * 0x10001


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
