"""Levels for one coordinate of a random unit vector: Lloyd-Max's, and odd integers that come close to them.

A kernel keeps an odd level as the byte (level - 1) / 2, in -128 to 127, which 8-bit integer tensor cores
multiply without error: x . levels = unit * (2 * x . bytes + sum(x)). Odd levels are exactly symmetric and
have no zero. Divided by the right unit, up to 16 levels come close to odd integers; a search over all units
that make the largest level 64 to 255 finds it. 256 levels are all the odd integers there are.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import scipy
import torch
from torch import Tensor

from quantpress.errors import UnsupportedBitsError
from quantpress.quantization.density import CoordinateDensity, Floats

MAX_BITS = 8

_TOLERANCE = 1e-11  # of the largest level
_MAX_STEPS = 100

MAX_ODD_LEVEL = 255
_LEAST_TOP = 64  # a pattern with a smaller largest level is a coarser one
_SEARCH_STEPS = 4096
_LEAST_GAIN = 1e-12  # less is rounding noise between patterns that are multiples of each other


def lloyd_max(bits: int, head_dim: int) -> Tensor:
    """Levels of least squared error for one coordinate of a random unit vector.

    Args:
        bits: code width in bits per coordinate, 1 to 8.
        head_dim: dimension D >= 2 of the vector that the coordinate belongs to.

    Returns:
        [2**bits] float64, ascending, in units of 1/sqrt(D).

    Raises:
        UnsupportedBitsError: `bits` is outside 1 to 8.
        UnsupportedHeadDimError: `head_dim` is below 2.

    Source: Lloyd 1982, Max 1960; TurboQuant, arXiv 2504.19874, Algorithm 1.

    >>> [round(level, 4) for level in lloyd_max(2, 128).tolist()]
    [-1.5052, -0.4525, 0.4525, 1.5052]
    """
    half = positive_levels(bits, head_dim) * head_dim**0.5
    return torch.from_numpy(np.concatenate([-half[::-1], half]))


def check_bits(bits: int) -> None:
    """Refuse a width outside 1 to 8.

    Raises:
        UnsupportedBitsError: `bits` is not a whole number from 1 to 8.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MAX_BITS:
        raise UnsupportedBitsError(f"a codebook needs a whole width of 1 to {MAX_BITS} bits, got {bits!r}")


@lru_cache(maxsize=512, typed=True)  # typed: 4.0 and True are not 4 and 1
def positive_levels(bits: int, head_dim: int) -> Floats:
    """The upper half of the Lloyd-Max levels, in units of the coordinate. Cached and read-only.

    Newton's method on the two optimality conditions (each level is the centroid of its cell, each threshold
    the midpoint of its levels), started from the levels of high-resolution theory, whose density is f^(1/3).

    Args:
        bits: 1 to 8.
        head_dim: D >= 2.

    Returns:
        [2**(bits-1)] float64, ascending, in (0, 1).
    """
    check_bits(bits)
    density = CoordinateDensity(head_dim)
    count = 2 ** (bits - 1)
    quantile = (np.arange(count) + 0.5) / count
    half: Floats = np.sqrt(scipy.special.betaincinv(0.5, (head_dim - 3) / 6 + 1, quantile))
    for _ in range(_MAX_STEPS):
        step = _newton_step(density, half)
        moved = half + step
        if np.any(np.diff(np.concatenate([[0.0], moved, [1.0]])) <= 0):  # overshot: take a plain Lloyd step
            low, high = density.cells(half)
            moved = density.first_moment(low, high) / density.mass(low, high)
        half = moved
        if np.abs(step).max() < _TOLERANCE * half[-1]:
            break
    half.setflags(write=False)
    return half


def _newton_step(density: CoordinateDensity, half: Floats) -> Floats:
    """Newton's step for half - centroid(half) = 0, whose Jacobian is tridiagonal. [n] -> [n]."""
    low, high = density.cells(half)
    mass = density.mass(low, high)
    centroid = density.first_moment(low, high) / mass
    by_low = density.pdf(low[1:]) * (centroid[1:] - low[1:]) / mass[1:] / 2
    by_high = density.pdf(high[:-1]) * (high[:-1] - centroid[:-1]) / mass[:-1] / 2
    bands = np.zeros((3, half.size))
    bands[0, 1:] = -by_high
    bands[1] = 1.0
    bands[1, 1:] -= by_low
    bands[1, :-1] -= by_high
    bands[2, :-1] = -by_low
    return np.asarray(scipy.linalg.solve_banded((1, 1), bands, centroid - half))


def fit_odd_levels(half: Floats, head_dim: int) -> tuple[Floats, float]:
    """Odd integers and a unit of least distortion whose products are close to given levels.

    Each unit of a fine grid gives a pattern of odd integers, 2 * round((level / unit - 1) / 2) + 1. Then the
    best unit of each pattern is found, with thresholds at the midpoints of its levels. 128 positive levels
    have one pattern, whose largest level lies below Lloyd-Max's.

    Args:
        half: [n] float64, the positive levels, ascending, in units of the coordinate; n is at most 128.
        head_dim: dimension D of the unit vector.

    Returns:
        (scaled, unit): scaled [n] float64, odd, ascending, 1 to 255; the levels are scaled * unit.
    """
    density = CoordinateDensity(head_dim)
    if 2 * len(half) > MAX_ODD_LEVEL:
        pattern = np.arange(1.0, MAX_ODD_LEVEL + 1, 2)
        return pattern, _best_unit(density, pattern, float(half[-1]) / MAX_ODD_LEVEL, 0.8, 1.0)
    tops = np.geomspace(MAX_ODD_LEVEL, _LEAST_TOP, _SEARCH_STEPS)
    units = half[-1] / tops
    rounded = round_to_odd(half / units[:, None])
    apart = np.all(rounded[:, 1:] > rounded[:, :-1], axis=1)
    patterns = {tuple(row): unit for row, unit in zip(rounded[apart].tolist(), units[apart], strict=True)}
    best_error, best = np.inf, (half, 1.0)
    for values, start in patterns.items():
        pattern = np.array(values)
        unit = _best_unit(density, pattern, float(start), 0.9, 1.1)
        error = density.distortion(pattern * unit)
        if error < best_error * (1 - _LEAST_GAIN):
            best_error, best = error, (pattern, unit)
    return best


def round_to_odd(values: Floats) -> Floats:
    """The odd integer nearest to each value, as float64."""
    return np.asarray(2 * np.round((values - 1) / 2) + 1)


def _best_unit(density: CoordinateDensity, pattern: Floats, unit: float, low: float, high: float) -> float:
    """The unit of least distortion of pattern * unit, low to high times `unit`, by Brent's method."""
    found = scipy.optimize.minimize_scalar(
        lambda trial: density.distortion(pattern * trial),
        bounds=(unit * low, unit * high),
        method="bounded",
        options={"xatol": unit * 1e-10},
    )
    return float(found.x)
