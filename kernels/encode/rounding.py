"""How the Hopper encode kernel rounds a coordinate: a polynomial, or a line for each of 32 cells.

The polynomial takes a multiply-add for each threshold. Lines take two at any width, and a look-up of the cell
in the lanes of a warp (`shfl`), which is slower than one.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

from quantpress.quantization.codebook import Codebook

CELLS = 32  # lanes of a warp
STEEPNESS = 12.0  # slope of the lines, in fields: below one over a whole cell


@dataclass(frozen=True)
class PolynomialRounding:
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
def polynomial_rounding(book: Codebook) -> PolynomialRounding:
    """The polynomial through (threshold k, k + 1/2), from its zero to where it reaches the last magnitude.

    Args:
        book: an int8 codebook of 3 or 4 bits for head_dim 128; the tests check the rounding of these.
    """
    t = np.array(book.thresholds[len(book.levels) // 2 :])
    halves = np.arange(len(t)) + 0.5
    through = Polynomial(np.linalg.solve(np.vander(t / t[-1], increasing=True), halves))
    zeros, tops = _real_roots(through), _real_roots(through - len(t))
    zero, top = zeros[np.abs(zeros).argmin()], tops[tops > 1].min()
    scale = 1 / (top - zero)
    coefficients = through(Polynomial([zero, top - zero])).coef
    return PolynomialRounding(
        float(scale / t[-1]), float(-zero * scale), tuple(map(float, coefficients[:0:-1]))
    )


def _real_roots(polynomial: Polynomial) -> Any:
    roots = polynomial.roots()
    return np.real(roots[np.abs(np.imag(roots)) < 1e-9])


@dataclass(frozen=True)
class CellRounding:
    """The field of a coordinate u: the whole number nearest to STEEPNESS * b + starts[n].

    b = min(max(scale * u + shift, 0), 1) and n is the whole number nearest to (CELLS - 1) * b.

    Args:
        scale: factor on u, or on |u| where `shift` is 0.
        shift: 1/2 where fields are codes, 0 where they are magnitudes.
        starts: of each cell. No field is below 0 before it is rounded: -0 would have a sign.
    """

    scale: float
    shift: float
    starts: tuple[float, ...]


@lru_cache(maxsize=64)
def cell_rounding(book: Codebook) -> CellRounding:
    """Lines that meet k + 1/2 at threshold k, flat enough to meet no other.

    Args:
        book: an int8 codebook for head_dim 128, of 3 bits, whose fields are codes, or of 4 bits, whose fields
            are magnitudes.
    """
    t = np.array(book.thresholds)
    shift = 0.5 if book.bits == 3 else 0.0
    t = t if shift else t[len(book.levels) // 2 :]
    scale = (1 - shift) / (1.06 * t[-1])  # 1 lies beyond the last threshold
    ends = scale * t + shift
    starts = []
    for n in range(CELLS):
        middle = n / (CELLS - 1)
        inside = np.flatnonzero(np.abs(ends - middle) <= 0.5 / (CELLS - 1))
        if len(inside):
            at, field = ends[inside[0]], inside[0] + 0.5
        else:
            at, field = middle, np.count_nonzero(ends < middle) + 0.25
        starts.append(float(field - STEEPNESS * at))
    return CellRounding(float(scale), shift, tuple(starts))
