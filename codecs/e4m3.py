"""Codebook levels that an 8-bit float holds exactly.

float8_e4m3fn has 8 values an octave. Multiplied by one common factor, the `unit`, some of them come close to
any 16 levels; which unit is best is found by an exact search. The level pattern repeats when the unit
doubles, so one octave of units is all there is to search.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import optimize

from quantpress.codecs.density import CoordinateDensity, Floats

_TOP_LEVEL = 8.0  # the largest scaled level lies in [8, 16): far from overflow, and the rest stay normal
_SEARCH_STEPS = 1024
_LEAST_GAIN = 1e-12  # less is rounding noise between patterns that are multiples of each other


def fit_e4m3(half: Floats, head_dim: int) -> tuple[Floats, float]:
    """The e4m3 pattern and unit with the least exact distortion near given levels.

    Each of 1024 units in one octave gives a pattern, the levels divided by the unit and rounded. Then each
    pattern's own best unit is found, with thresholds at the midpoints of its levels.

    Args:
        half: [n] float64, the positive levels to come close to, ascending, in units of the coordinate.
        head_dim: dimension D of the unit vector.

    Returns:
        (scaled [n] float64, each exactly representable in float8_e4m3fn, ascending and positive; unit). The
        levels are scaled * unit. They stay apart: two that merge never have the least distortion.
    """
    density = CoordinateDensity(head_dim)
    units = half[-1] / _TOP_LEVEL * 2.0 ** (-np.arange(_SEARCH_STEPS) / _SEARCH_STEPS)
    patterns = {tuple(round_to_e4m3(half / unit).tolist()): float(unit) for unit in units}
    best_error, best = np.inf, (half, 1.0)
    for values, start in patterns.items():
        pattern = np.array(values)
        unit = _best_unit(density, pattern, start)
        error = density.distortion(pattern * unit)
        if error < best_error * (1 - _LEAST_GAIN):
            best_error, best = error, (pattern, unit)
    return best


def round_to_e4m3(values: Floats) -> Floats:
    """Nearest float8_e4m3fn of each value, as float64."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
    return np.asarray(rounded.double().numpy())


def _best_unit(density: CoordinateDensity, pattern: Floats, unit: float) -> float:
    """The unit near `unit` with the least distortion of pattern * unit, by Brent's method."""
    found = optimize.minimize_scalar(
        lambda trial: density.distortion(pattern * trial),
        bounds=(unit * 0.9, unit * 1.1),
        method="bounded",
        options={"xatol": unit * 1e-10},
    )
    return float(found.x)
