"""What a code of b bits per coordinate can reach: the limit, the paper's bounds, the best scalar code.

All are squared errors E|u - u'|^2 of a unit vector u and its decoded u'. Bits may be fractional where the
formula allows it.
"""

from __future__ import annotations

import math

from quantpress.quantization.codebook import codebook

PAPER_MSE_CONSTANT = math.sqrt(3) * math.pi / 2
"""TurboQuant, arXiv 2504.19874, Theorem 1: the high-resolution constant of Panter and Dite, Gaussian case."""

PAPER_PRODUCT_CONSTANT = math.sqrt(3) * math.pi**2
"""TurboQuant, arXiv 2504.19874, Theorem 2."""


def shannon_distortion(bits: float) -> float:
    """4^-bits: in high dimension no code of `bits` per coordinate has a smaller distortion.

    Source: TurboQuant, arXiv 2504.19874, Theorem 3, from Shannon's distortion-rate function.

    >>> shannon_distortion(2)
    0.0625
    """
    return math.pow(4.0, -bits)


def paper_mse_bound(bits: float) -> float:
    """The paper's upper bound for TurboQuant_mse (Theorem 1), sqrt(3) pi / 2 * 4^-bits."""
    return PAPER_MSE_CONSTANT * shannon_distortion(bits)


def paper_product_bound(bits: float, head_dim: int, query_norm: float = 1.0) -> float:
    """The paper's upper bound for TurboQuant_prod, E|q.u - estimate|^2 <= sqrt(3) pi^2 |q|^2 / D * 4^-bits.

    Args:
        bits: code width per coordinate, the sketch's bit included.
        head_dim: dimension D of the vectors.
        query_norm: |q|.

    Source: TurboQuant, arXiv 2504.19874, Theorem 2.
    """
    return PAPER_PRODUCT_CONSTANT * query_norm**2 / head_dim * shannon_distortion(bits)


def lloyd_max_distortion(bits: int, head_dim: int) -> float:
    """The exact distortion of the best scalar code.

    Args:
        bits: code width, 1 to 8.
        head_dim: dimension D >= 2 of the unit vector.

    Raises:
        UnsupportedBitsError: `bits` is outside 1 to 8.
        UnsupportedHeadDimError: `head_dim` is below 2.

    >>> round(lloyd_max_distortion(2, 128), 4)
    0.116
    """
    return codebook(bits, head_dim, "lloyd_max").distortion
