"""How the Hopper encode kernel rounds coordinates at 3 and 4 bits: two float16 numbers at a time.

Levels of an "int8" codebook are odd multiples of a unit, so thresholds are whole multiples of it: a
coordinate rounded down to whole units, n, has the coordinate's code. Multiply-adds of float16 numbers turn n
into something near the code, and the last of them adds 1024, from where on float16 holds whole numbers, which
rounds it. n is float16, so only so many numbers can come; the tests try each of them.

    "cubic"   of 4 bits: with v = clamp(|n| s + c), a cubic in v that is i + 1/2 between n = t - 1 and t,
              t the threshold i. It makes the magnitude
    "square"  of values at 3 bits: a square in v likewise
    "lines"   of keys at 3 bits, n signed: the sum of two clamped lines, which makes the code itself

The numbers were found by linear programs, as float16 then by trial.
"""

from dataclasses import dataclass

from quantpress.quantization.codebook import Codebook


@dataclass(frozen=True)
class Rounding:
    """Numbers of float16 of one rounding.

    Args:
        kind: "cubic", "square" or "lines", as the module has them.
        centre: what is added to n. "lines" have the numbers about it, where a unit is float16's last bit;
            else n counts float16's smallest numbers.
        held: two or three numbers that stay in registers.
        written: numbers that stand in instructions.
    """

    kind: str
    centre: float
    held: tuple[float, ...]
    written: tuple[float, ...]


_CUBIC = Rounding("cubic", 0.0, (65280.0, -2.556640625), (-0.040863037109375, -2.669921875, 12.1796875))
_SQUARE = Rounding("square", 0.0, (65280.0, -1.5556640625), (-0.10504150390625, 4.91796875))
_LINES = Rounding(
    "lines",
    1279.5,
    (0.005290985107421875, 0.002185821533203125, 0.96533203125),
    (-6.26953125, -2.296875, 6.25),
)


def rounding_of(book: Codebook, values: bool) -> Rounding:
    """The rounding for an int8 codebook of 3 or 4 bits at head_dim 128, of values or of keys."""
    if book.bits == 4:
        return _CUBIC
    return _SQUARE if values else _LINES
