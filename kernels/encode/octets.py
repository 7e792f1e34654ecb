"""PTX for the Hopper encode kernel: eight coordinates at a time, from float32 to a packed word.

A thread holds two rows of the product and four columns of each: y[h][i]. Their fields are found thus:

    2 bits           thresholds are evenly spaced: the code is three times a clamped multiply-add, rounded
    keys, 3 and 4    by `cell_rounding`, with the cells in the lanes of a warp. Fields are multiples of the
                     smallest float16 number, and a conversion to float16 rounds two at a time
    values, 3 and 4  by `polynomial_rounding`

What rounds one field at a time is a multiply-add that adds 2**23, which leaves the field in the low bits, and
another number, which makes the low 16 bits a selector of `prmt`: a byte permutation of the levels by it gives
the level. The results of eight coordinates are shifted and added up as they are; the constants that they hold
beside their fields are subtracted at the end.
"""

from functools import lru_cache

from quantpress.kernels.encode.assembly import float_bits, hex_float
from quantpress.kernels.encode.rounding import (
    CELLS,
    STEEPNESS,
    cell_rounding,
    polynomial_rounding,
)
from quantpress.quantization.codebook import Codebook

FACTOR = 2.0**64
"""Factor on coordinates of values: levels are read as level * 2**-149, and products must be normal."""

GATHER_CONSTRAINTS = "=&r,=&r,=&r,=&r,r,r,r,r"

_MAGIC = {2: 2.0**23 + 0x9990, 3: 2.0**23 + 0x8880, 4: 2.0**23 + 0x8880}
"""The last four bits take the field; `prmt` then picks one byte and the sign of another, which has none."""

_BASE = {4: 0, 3: 4}
"""The field of magnitude 0, by width: 2**(bits - 1), but 0 for the sign and magnitude of 4 bits."""

_TINY = 2.0**-24  # the smallest number of float16
_HALF = 0.5 - 2.0**-25  # a coordinate of 0 takes the lower code


@lru_cache(maxsize=64)
def octet_assembly(book: Codebook, values: bool) -> str:
    """PTX that rounds eight coordinates and joins their fields.

    Args:
        book: an int8 codebook of 2, 3 or 4 bits for head_dim 128.
        values: whether the vectors are values, not keys.

    Returns:
        Assembly. Inputs: y[0][0 to 3] and y[1][0 to 3]; for each row `steepness` over the vector's norm; the
        `zero_fields` of zero vectors, joined; the two words of `octet_table`, and the lane's number of its
        others. Outputs: the word, with the nibble of y[h][i] at bit 8 i + 4 h (values) or 16 h + 4 i (keys);
        for each row the sum over i of |y| FACTOR level 2**-149 (values) or of level**2 (keys), with levels in
        units of the codebook's.
    """
    lines = ["mov.b32 lo, $14;", "mov.b32 hi, $15;"]  # inputs: constants would be copied at each use
    if book.bits == 2 or values:
        lines += _added_fields(book, values)
    else:
        lines += _converted_fields(book)
    if values:
        lines += ["mov.b32 $1, q0;", "mov.b32 $2, q1;"]
    else:
        for row in range(2):
            lines += [f"shr.u32 m, w, {16 * row};", "prmt.b32 t, lo, hi, m;"]
            lines.append(f"dp4a.u32.u32 ${1 + row}, t, t, 0;")
    lines += _signs(book.bits) if _signed_apart(book.bits, values) else ["mov.b32 $0, w;"]
    registers = ".reg .b32 a, b, g, v, v0, v1, q0, q1, m, t, w, lo, hi, A, B;"
    return "{ " + registers + "\n" + "\n".join(lines) + "\n}"


def octet_constraints(values: bool) -> str:
    """Register constraints of `octet_assembly`."""
    return ("=&r,=&f,=&f" if values else "=&r,=&r,=&r") + ",f" * 10 + ",r,r,r,f"


def steepness(book: Codebook, values: bool) -> float:
    """What one over a vector's norm is multiplied by before it goes into `octet_assembly`."""
    if book.bits == 2:
        return 1 / (3 * book.thresholds[-1])
    return polynomial_rounding(book).scale / FACTOR if values else cell_rounding(book).scale


def octet_table(book: Codebook, values: bool) -> list[int]:
    """[34] int32 numbers: levels as the bytes of two words, and the bits of a float32 for each lane.

    Levels are looked up by code where fields are codes, else by magnitude.
    """
    levels = [abs(int(level)) for level in book.scaled]
    if _signed_apart(book.bits, values):
        levels = levels[len(levels) // 2 :]
    levels = (levels + [0] * 8)[:8]
    words = [sum(level << (8 * i) for i, level in enumerate(levels[at : at + 4])) for at in (0, 4)]
    own: tuple[float, ...] = (0.0,) * CELLS
    if book.bits > 2 and values:
        own = polynomial_rounding(book).coefficients[:1] * CELLS
    elif book.bits > 2:
        own = tuple(start * _TINY for start in cell_rounding(book).starts)
    return [_signed(word) for word in (*words, *map(float_bits, own))]


def zero_fields(bits: int, values: bool) -> tuple[int, int]:
    """What gives zero vectors the codes of negative numbers, in row 0 and in row 1."""
    if not _signed_apart(bits, values):
        return 0, 0
    masks = (0x80808080, 0x08080808) if bits == 4 else (0x0F0F0F0F, 0xF0F0F0F0)
    return _signed(masks[0]), _signed(masks[1])


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


def _signed_apart(bits: int, values: bool) -> bool:
    """Whether fields are magnitudes first, and the signs are put in at the end."""
    return bits == 4 or (bits == 3 and values)


def _input(row: int, column: int) -> str:
    return f"${3 + 4 * row + column}"


def _added_fields(book: Codebook, values: bool) -> list[str]:
    """w = the fields of eight coordinates, rounded by addition; q0, q1 = sums of values."""
    lines, surplus = [], 0
    magic = _MAGIC[book.bits]
    for row in range(2):
        for column in range(4):
            y = _input(row, column)
            if values:
                lines += [f"abs.f32 a, {y};", f"mul.f32 a, a, {hex_float(FACTOR)};"]
            if book.bits == 2:
                lines.append(f"fma.rn.sat.f32 b, {y}, ${11 + row}, {hex_float(_HALF)};")
                lines.append(f"fma.rn.f32 v, b, {hex_float(3)}, {hex_float(magic)};")
            else:
                rounding = polynomial_rounding(book)
                lines.append(f"fma.rn.sat.f32 b, a, ${11 + row}, {hex_float(rounding.shift)};")
                lines += _horner(rounding.coefficients, magic)
            if values:
                lines.append("prmt.b32 t, lo, hi, v;")
                lines.append(f"fma.rn.f32 q{row}, a, t, q{row};" if column else f"mul.rn.f32 q{row}, a, t;")
            shift = 8 * column + 4 * row if values else 16 * row + 4 * column
            surplus += (float_bits(magic) - _BASE.get(book.bits, 0)) << shift
            lines += [f"shl.b32 m, v, {shift};", "add.u32 w, w, m;"] if shift else ["mov.b32 w, v;"]
    return [*lines, f"add.u32 w, w, {-surplus & 0xFFFFFFFF:#x};"]


def _converted_fields(book: Codebook) -> list[str]:
    """w = the fields of eight coordinates of keys, rounded by conversion, two rows at a time."""
    shift, lines = cell_rounding(book).shift, []
    for column in range(4):
        for row in range(2):
            y = _input(row, column)
            if shift:
                lines.append(f"fma.rn.sat.f32 b, {y}, ${11 + row}, {hex_float(_HALF)};")
            else:
                lines += [f"abs.f32 a, {y};", f"mul.rn.sat.f32 b, a, ${11 + row};"]
            lines.append(f"fma.rn.f32 g, b, {hex_float(CELLS - 1)}, {hex_float(2.0**23)};")
            lines.append("shfl.sync.idx.b32 t, $16, g, 0x1f, 0xffffffff;")
            lines.append(f"fma.rn.f32 v{row}, b, {hex_float(STEEPNESS * _TINY)}, t;")
        lines.append("cvt.rn.f16x2.f32 m, v1, v0;")
        lines += [f"shl.b32 m, m, {4 * column};", "add.u32 w, w, m;"] if column else ["mov.b32 w, m;"]
    return lines


def _horner(coefficients: tuple[float, ...], magic: float) -> list[str]:
    """v = f(b) + magic; the first coefficient is an input."""
    steps = [f"fma.rn.f32 g, b, $16, {hex_float(coefficients[1])};"]
    steps += [f"fma.rn.f32 g, g, b, {hex_float(c)};" for c in coefficients[2:]]
    return [*steps, f"fma.rn.f32 v, g, b, {hex_float(magic)};"]


def _signs(bits: int) -> list[str]:
    """Put the signs into the word: at 4 bits as bits of their own, else by inverting negative fields."""
    lines = []
    for row, out in enumerate("AB"):  # byte i is 0xFF where y[row][i] is negative
        a, b, c, d = (_input(row, i) for i in range(4))
        lines += [f"prmt.b32 {out}, {a}, {b}, 0x00fb;", f"prmt.b32 {out}, {out}, {c}, 0x0f10;"]
        lines.append(f"prmt.b32 {out}, {out}, {d}, 0xf210;")
    join, mask, put = ("0xf0f0f0f0", "0x88888888", "or") if bits == 4 else ("0x0f0f0f0f", "0x77777777", "xor")
    lines.append(f"lop3.b32 A, A, B, {join}, 0xE4;")  # A where the mask is set, else B
    lines.append(f"lop3.b32 A, A, $13, {mask}, 0xA8;")  # (A | zero) & mask
    return [*lines, f"{put}.b32 $0, w, A;"]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
