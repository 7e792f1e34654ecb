"""PTX for rounding in the encode kernel.

A comparison is a saturated multiply-add, s = clamp(a * 2**60 - t * 2**60, 0, 1), which is exactly 1 for a > t
and else 0. That runs at twice the rate of comparing and selecting, and keeps no predicates alive over a tile.
Thresholds and levels are immediates, so each codebook has assembly of its own.
"""

import struct
from functools import lru_cache

from quantpress.quantization.codebook import Codebook

_STEEP = 2.0**60  # makes the least difference between a coordinate and a threshold larger than 1
_WHOLE = 2.0**23  # from here on a float32 holds a whole number in its last bits
_TOP = 2**19  # the largest level, in steps of 8, which leave three bits for the magnitude
_LANES = {2: 0x3333, 3: 0x7777, 4: 0x7777}


@lru_cache(maxsize=64)
def rounding_assembly(book: Codebook, rule: str) -> str:
    """PTX that rounds a coordinate u to its nearest level and makes the field of its code.

    Args:
        book: a codebook of 2, 3 or 4 bits.
        rule: the scale rule, which decides what the second output is, in units of `summand_unit`:
            "norm_corrected" level**2, "unbiased" level * |u|, "norm" 0. Levels are good to 2**-19 of the
            largest.

    Returns:
        Assembly. Its inputs are u times any factor, the shift of the field, the sign's bit (for 4 bits; else
        ignored), and 2**60 over the factor; its outputs the shifted field and the rule's summand (times the
        factor, if it has u).
    """
    half = 1 << (book.bits - 1)
    t, levels = book.thresholds[half:], book.levels[half:]
    lines = ["abs.f32 a, $2;", "setp.le.f32 n, $2, 0f00000000;"]
    if rule == "norm" and book.bits == 4:  # a binary search takes fewer steps where the level is not needed
        lines += [
            _above("p", hex_float(-t[3] * _STEEP)),
            _mad("w", "p", t[1] - t[5], -t[1]),
            _above("q", "w"),
        ]
        lines += [_mad("w", "p", t[0] - t[4], -t[0]), _mad("v", "p", t[2] - t[6] - t[0] + t[4], t[0] - t[2])]
        lines += [
            "fma.rn.f32 w, q, v, w;",
            _above("r", "w"),
            f"fma.rn.f32 v, p, {hex_float(4)}, {hex_float(_WHOLE)};",
        ]
        lines += [
            f"fma.rn.f32 v, q, {hex_float(2)}, v;",
            "add.f32 v, v, r;",
            "mov.b32 m, v;",
            "and.b32 m, m, 7;",
        ]
    else:
        marked = [round(level / levels[-1] * _TOP) * 8 + size for size, level in enumerate(levels)]
        lines += [f"mov.f32 v, {hex_float(_WHOLE + marked[0])};"]
        for i, threshold in enumerate(t):
            lines += [_above("p", hex_float(-threshold * _STEEP))]
            lines += [f"fma.rn.f32 v, p, {hex_float(marked[i + 1] - marked[i])}, v;"]
        lines += ["mov.b32 m, v;", "and.b32 m, m, 7;"]
    if book.bits == 4:
        lines += ["shl.b32 m, m, $3;", "@n or.b32 m, m, $4;", "mov.b32 $0, m;"]
    else:  # codes half + m and half - 1 - m
        lines += [f"xor.b32 m, m, {half};", f"@n xor.b32 m, m, {2 * half - 1};", "shl.b32 $0, m, $3;"]
    if rule == "norm":
        lines += ["mov.f32 $1, 0f00000000;"]
    else:
        factor = "v" if rule == "norm_corrected" else "a"
        lines += [f"sub.f32 v, v, {hex_float(_WHOLE)};", f"mul.f32 $1, v, {factor};"]
    registers = ".reg .pred n; .reg .f32 a, p, q, r, v, w; .reg .b32 m;"
    return "{ " + registers + "\n" + "\n".join(lines) + "\n}"


def summand_unit(book: Codebook, rule: str) -> float:
    """The value of one unit of the summand that `rounding_assembly` returns."""
    unit = book.levels[-1] / (8 * _TOP)
    return {"norm": 1.0, "norm_corrected": unit * unit, "unbiased": unit}[rule]


@lru_cache(maxsize=64)
def squares_assembly(book: Codebook) -> tuple[str, float]:
    """PTX that adds up the squared levels of four fields of a key's word, and the unit of the sum.

    Returns:
        Assembly whose inputs are a word and the shift of its first field and whose output is the sum; empty
        for levels that are not bytes times a unit.
    """
    if book.form != "int8" or book.bits not in _LANES:
        return "", 0.0
    table = [int(level) for level in book.scaled[len(book.scaled) // 2 :]]
    if book.bits < 4:  # a field is the code itself
        table = [*reversed(table), *table]
    table += [0] * (8 - len(table))
    low, high = (sum(size << (8 * i) for i, size in enumerate(table[at : at + 4])) for at in (0, 4))
    lines = [f"mov.b32 a, {low:#x};", f"mov.b32 b, {high:#x};", "shr.u32 t, $1, $2;"]
    lines += [f"and.b32 t, t, {_LANES[book.bits]:#x};", "prmt.b32 t, a, b, t;", "dp4a.u32.u32 $0, t, t, 0;"]
    return "{ .reg .b32 a, b, t;\n" + "\n".join(lines) + "\n}", book.unit**2


def _above(result: str, negated: str) -> str:
    """`result` = 1 where a is above the threshold, given as -threshold * 2**60, else 0."""
    return f"fma.rn.sat.f32 {result}, a, $5, {negated};"


def _mad(result: str, switch: str, slope: float, offset: float) -> str:
    """`result` = (slope * switch + offset) * 2**60."""
    return f"fma.rn.f32 {result}, {switch}, {hex_float(slope * _STEEP)}, {hex_float(offset * _STEEP)};"


def float_bits(x: float) -> int:
    """A number as the bits of a float32."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0])


def hex_float(x: float) -> str:
    """A number as a float32 immediate."""
    return f"0f{float_bits(x):08X}"
