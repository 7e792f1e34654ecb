"""The exact density of one coordinate of a uniform unit vector in D dimensions.

f(x) = Gamma(D/2) / (sqrt(pi) Gamma((D-1)/2)) * (1 - x^2)^((D-3)/2) on [-1, 1].

The masses and first moments of its cells have closed forms, so codebooks and distortions need no numerical
integration. Source: TurboQuant, arXiv 2504.19874, Lemma 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy

from quantpress.errors import UnsupportedHeadDimError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CoordinateDensity:
    """f for D = `dim`. All arguments are arrays in [0, 1]; negative coordinates follow by symmetry.

    Args:
        dim: dimension D, at least 2.

    Raises:
        UnsupportedHeadDimError: `dim` is below 2.
    """

    dim: int

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int) or self.dim < 2:
            raise UnsupportedHeadDimError(
                f"the coordinate density needs a head_dim of at least 2, got {self.dim!r}"
            )

    @property
    def constant(self) -> float:
        """Gamma(D/2) / (sqrt(pi) Gamma((D-1)/2))."""
        return math.exp(math.lgamma(self.dim / 2) - math.lgamma((self.dim - 1) / 2)) / math.sqrt(math.pi)

    def pdf(self, x: Floats) -> Floats:
        """f(x), float64, same shape as x."""
        return np.asarray(self.constant * (1.0 - x * x) ** ((self.dim - 3) / 2))

    def mass(self, low: Floats, high: Floats) -> Floats:
        """P(low < X < high). X^2 is Beta(1/2, (D-1)/2); its upper tail keeps cells far out exact."""
        tail = scipy.special.betaincc(0.5, (self.dim - 1) / 2, np.stack([low * low, high * high]))
        return np.asarray((tail[0] - tail[1]) / 2)

    def first_moment(self, low: Floats, high: Floats) -> Floats:
        """Integral of x f(x) from low to high."""
        power = (self.dim - 1) / 2
        edges = (1.0 - np.stack([low, high]) ** 2) ** power
        return np.asarray(self.constant * (edges[0] - edges[1]) / (2 * power))

    def cells(self, half: Floats) -> tuple[Floats, Floats]:
        """Lower and upper edges of the cells of positive levels, [n] ascending: 0, the midpoints, 1."""
        middle = (half[1:] + half[:-1]) / 2
        return np.concatenate([[0.0], middle]), np.concatenate([middle, [1.0]])

    def distortion(self, half: Floats) -> float:
        """The exact squared error of a uniform unit vector rounded to the nearest levels.

        Args:
            half: [n] float64, the positive levels, ascending, in units of the coordinate.
        """
        low, high = self.cells(half)
        second_moment = 1.0 / (2 * self.dim)  # of the positive half; both halves make 1 / D
        inner = np.dot(half, self.first_moment(low, high))
        power = np.dot(half * half, self.mass(low, high))
        return float(2 * self.dim * (second_moment - 2 * inner + power))
