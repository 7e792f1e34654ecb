"""Lloyd-Max quantization of one coordinate of a random unit vector."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from scipy import linalg, special
from torch import Tensor

from quantpress.errors import UnsupportedBitsError
from quantpress.quantization.density import CoordinateDensity, Floats

MAX_BITS = 8

_TOLERANCE = 1e-11  # of the largest level
_MAX_STEPS = 100


def lloyd_max(bits: int, head_dim: int) -> Tensor:
    """Levels of least squared error for one coordinate of a random unit vector.

    Args:
        bits: code width in bits per coordinate, 1 to 8.
        head_dim: dimension D >= 2 of the vector the coordinate belongs to.

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
    """The upper half of the Lloyd-Max levels, in units of the coordinate itself. Cached and read-only.

    Newton's method on the two optimality conditions (each level is the centroid of its cell, each threshold
    the midpoint of its levels), started from the companded levels of high-resolution theory, density f^(1/3).

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
    half: Floats = np.sqrt(special.betaincinv(0.5, (head_dim - 3) / 6 + 1, quantile))
    for _ in range(_MAX_STEPS):
        step = _newton_step(density, half)
        moved = half + step
        if np.any(
            np.diff(np.concatenate([[0.0], moved, [1.0]])) <= 0
        ):  # overshot: one plain Lloyd step instead
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
    return np.asarray(linalg.solve_banded((1, 1), bands, centroid - half))
