"""Codebook levels that a signed byte holds exactly: odd integers of at most 255, times one common unit.

A kernel keeps the byte (level - 1) / 2, in -128 to 127, and 8-bit integer tensor cores multiply it without
error: x . levels = unit * (2 * x . bytes + sum(x)). Odd levels are exactly symmetric and have no zero.
Divided by the right unit, up to 16 levels come close to odd integers; a search over all units that make the
largest level 64 to 255 finds it.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize

from quantpress.quantization.density import CoordinateDensity, Floats

MAX_ODD_LEVEL = 255
_LEAST_TOP = 64  # a pattern with a smaller largest level is a coarser one
_SEARCH_STEPS = 4096
_LEAST_GAIN = 1e-12  # less is rounding noise between patterns that are multiples of each other


def fit_odd_levels(half: Floats, head_dim: int) -> tuple[Floats, float]:
    """The pattern of odd integers and the unit with the least exact distortion near given levels.

    Each unit of a fine grid gives a pattern, 2 * round((level / unit - 1) / 2) + 1. Then each pattern's own
    best unit is found, with thresholds at the midpoints of its levels.

    Args:
        half: [n] float64, the positive levels to come close to, ascending, in units of the coordinate.
        head_dim: dimension D of the unit vector.

    Returns:
        (scaled [n] float64, odd, ascending, 1 to 255; unit). The levels are scaled * unit.
    """
    density = CoordinateDensity(head_dim)
    tops = np.geomspace(MAX_ODD_LEVEL, _LEAST_TOP, _SEARCH_STEPS)
    units = half[-1] / tops
    rounded = round_to_odd(half / units[:, None])
    apart = np.all(rounded[:, 1:] > rounded[:, :-1], axis=1)
    patterns = {tuple(row): unit for row, unit in zip(rounded[apart].tolist(), units[apart], strict=True)}
    best_error, best = np.inf, (half, 1.0)
    for values, start in patterns.items():
        pattern = np.array(values)
        unit = _best_unit(density, pattern, float(start))
        error = density.distortion(pattern * unit)
        if error < best_error * (1 - _LEAST_GAIN):
            best_error, best = error, (pattern, unit)
    return best


def round_to_odd(values: Floats) -> Floats:
    """Nearest odd integer of each value, as float64."""
    return np.asarray(2 * np.round((values - 1) / 2) + 1)


def _best_unit(density: CoordinateDensity, pattern: Floats, unit: float) -> float:
    """The unit near `unit` with the least distortion of pattern * unit, by Brent's method."""
    found = optimize.minimize_scalar(
        lambda trial: density.distortion(pattern * trial),
        bounds=(unit * 0.9, unit * 1.1),
        method="bounded",
        options={"xatol": unit * 1e-10},
    )
    return float(found.x)
