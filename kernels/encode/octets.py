"""PTX for the Hopper encode kernel: eight coordinates at a time, from float32 to a packed word.

A thread holds two rows of the product and four columns of each: y[h][i]. Rounding is a polynomial that has
the value k + 1/2 at threshold k. Its last multiply-add adds 2**23, which leaves the magnitude of the code in
the low bits, and another number, which makes the low 16 bits a selector of `prmt`: a byte permutation of the
levels by it gives the level. The results of eight coordinates are shifted and added up as they are; the
constants that they hold beside their fields are subtracted at the end.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

from quantpress.kernels.encode.assembly import float_bits, hex_float
from quantpress.quantization.codebook import Codebook

FACTOR = 2.0**64
"""Factor on coordinates of values: levels are read as level * 2**-149, and products must be normal."""

GATHER_CONSTRAINTS = "=&r,=&r,=&r,=&r,r,r,r,r"

_MAGIC = 2.0**23 + 0x8880
"""The last four bits take the magnitude; `prmt` then picks one byte and three zeros."""

_BASE = {4: 0, 3: 4, 2: 2}
"""The field of magnitude 0, by width: 2**(bits - 1), but 0 for the sign and magnitude of 4 bits."""


@dataclass(frozen=True)
class Rounding:
    """The magnitude of a coordinate u: the whole number nearest to f(min(max(scale * |u| + shift, 0), 1)).

    Args:
        scale: factor on |u|.
        shift: added to it.
        coefficients: of the polynomial f, from the highest power to the first; f has no constant.
    """

    scale: float
    shift: float
    coefficients: tuple[float, ...]


@lru_cache(maxsize=64)
def rounding_polynomial(book: Codebook) -> Rounding:
    """The polynomial through (threshold k, k + 1/2), from its zero to where it reaches the last magnitude.

    Args:
        book: an int8 codebook of 2, 3 or 4 bits for head_dim 128; the tests check the rounding of these.
    """
    t = np.array(book.thresholds[len(book.levels) // 2 :])
    if len(t) == 1:
        return Rounding(float(0.5 / t[0]), 0.0, (1.0,))
    halves = np.arange(len(t)) + 0.5
    through = Polynomial(np.linalg.solve(np.vander(t / t[-1], increasing=True), halves))
    zeros, tops = _real_roots(through), _real_roots(through - len(t))
    zero, top = zeros[np.abs(zeros).argmin()], tops[tops > 1].min()
    scale = 1 / (top - zero)
    coefficients = through(Polynomial([zero, top - zero])).coef
    return Rounding(float(scale / t[-1]), float(-zero * scale), tuple(map(float, coefficients[:0:-1])))


def _real_roots(polynomial: Polynomial) -> Any:
    roots = polynomial.roots()
    return np.real(roots[np.abs(np.imag(roots)) < 1e-9])


@lru_cache(maxsize=64)
def octet_assembly(book: Codebook, values: bool) -> str:
    """PTX that rounds eight coordinates and joins their fields.

    Args:
        book: as for `rounding_polynomial`.
        values: whether the vectors are values, not keys.

    Returns:
        Assembly. Inputs: y[0][0 to 3] and y[1][0 to 3]; for each row the polynomial's scale over the vector's
        norm (for values also over FACTOR); the `zero_fields` of zero vectors, joined; the three numbers of
        `octet_table`. Outputs: the word, with the nibble of y[h][i] at bit 8 i + 4 h (values) or 16 h + 4 i
        (keys); for each row the sum over i of |y| FACTOR level 2**-149 (values) or of level**2 (keys), with
        levels in units of the codebook's.
    """
    rounding = rounding_polynomial(book)
    lines = ["mov.b32 lo, $14;", "mov.b32 hi, $15;"]  # inputs: constants would be copied at each use
    surplus = 0
    for row in range(2):
        for column in range(4):
            lines.append(f"abs.f32 a, {_input(row, column)};")
            if values:
                lines.append(f"mul.f32 a, a, {hex_float(FACTOR)};")
            lines.append(f"fma.rn.sat.f32 b, a, ${11 + row}, {hex_float(rounding.shift)};")
            lines += _horner(rounding.coefficients)
            if values:
                lines.append("prmt.b32 t, lo, hi, v;")
                lines.append(f"fma.rn.f32 q{row}, a, t, q{row};" if column else f"mul.rn.f32 q{row}, a, t;")
            shift = 8 * column + 4 * row if values else 16 * row + 4 * column
            surplus += (float_bits(_MAGIC) - _BASE[book.bits]) << shift
            lines += [f"shl.b32 m, v, {shift};", "add.u32 w, w, m;"] if shift else ["mov.b32 w, v;"]
    lines.append(f"add.u32 w, w, {-surplus & 0xFFFFFFFF:#x};")
    if values:
        lines += ["mov.b32 $1, q0;", "mov.b32 $2, q1;"]
    else:
        for row in range(2):
            lines += [f"shr.u32 m, w, {16 * row};", "prmt.b32 t, lo, hi, m;"]
            lines.append(f"dp4a.u32.u32 ${1 + row}, t, t, 0;")
    lines += _signs(book.bits, values)
    return "{ .reg .b32 a, b, g, v, q0, q1, m, t, w, lo, hi, A, B;\n" + "\n".join(lines) + "\n}"


def octet_constraints(values: bool) -> str:
    """Register constraints of `octet_assembly`."""
    return ("=&r,=&f,=&f" if values else "=&r,=&r,=&r") + ",f" * 10 + ",r,r,r,f"


def octet_table(book: Codebook, values: bool) -> list[int]:
    """Levels as the bytes of two words, and the bits of the polynomial's first coefficient, as int32 numbers.

    Values look levels up by magnitude, keys by field.
    """
    rounding = rounding_polynomial(book)
    levels = [int(level) for level in book.scaled[len(book.scaled) // 2 :]]
    table = ([0] * (0 if values else _BASE[book.bits]) + levels + [0] * 8)[:8]
    words = [sum(level << (8 * i) for i, level in enumerate(table[at : at + 4])) for at in (0, 4)]
    return [_signed(word) for word in (*words, float_bits(rounding.coefficients[0]))]


def zero_fields(bits: int, values: bool) -> tuple[int, int]:
    """Fields of a zero vector in row 0 and in row 1: its coordinates have the codes of negative numbers."""
    if bits == 4:
        masks = 0x80808080, 0x08080808
    elif values:
        masks = 0x0F0F0F0F, 0xF0F0F0F0
    else:
        masks = 0x0000FFFF, 0xFFFF0000
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


def _input(row: int, column: int) -> str:
    return f"${3 + 4 * row + column}"


def _horner(coefficients: tuple[float, ...]) -> list[str]:
    """v = f(b) + _MAGIC; the first coefficient is an input."""
    if len(coefficients) == 1:
        return [f"add.rn.f32 v, b, {hex_float(_MAGIC)};"]
    steps = [f"fma.rn.f32 g, b, $16, {hex_float(coefficients[1])};"]
    steps += [f"fma.rn.f32 g, g, b, {hex_float(c)};" for c in coefficients[2:]]
    return [*steps, f"fma.rn.f32 v, g, b, {hex_float(_MAGIC)};"]


def _signs(bits: int, values: bool) -> list[str]:
    """Put the signs into the word: at 4 bits as bits of their own, else by inverting negative fields."""

    def gather(out: str, four: list[tuple[int, int]]) -> list[str]:
        """Byte k is 0xFF where coordinate k of four is negative."""
        a, b, c, d = (_input(*one) for one in four)
        lines = [f"prmt.b32 {out}, {a}, {b}, 0x00fb;", f"prmt.b32 {out}, {out}, {c}, 0x0f10;"]
        return [*lines, f"prmt.b32 {out}, {out}, {d}, 0xf210;"]

    if values or bits == 4:
        lines = gather("A", [(0, i) for i in range(4)]) + gather("B", [(1, i) for i in range(4)])
    else:
        lines = gather("A", [(0, 0), (0, 2), (1, 0), (1, 2)]) + gather("B", [(0, 1), (0, 3), (1, 1), (1, 3)])
    if bits == 4:
        join, mask, put = "0xf0f0f0f0", "0x88888888", "or"
    else:
        join, mask, put = "0x0f0f0f0f", "0x77777777" if bits == 3 else "0x33333333", "xor"
    lines.append(f"lop3.b32 A, A, B, {join}, 0xE4;")  # A where the mask is set, else B
    lines.append(f"lop3.b32 A, A, $13, {mask}, 0xA8;")  # (A | zero) & mask
    return [*lines, f"{put}.b32 $0, w, A;"]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
