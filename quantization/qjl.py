"""The quantized Johnson-Lindenstrauss sketch: one sign per channel, unbiased inner products.

With a Gaussian matrix S, rows s_i ~ N(0, I), and a vector r, the sketch keeps |r| and the signs of S r. For
every q

    E[ sqrt(pi/2) / D * |r| * sum_i (S q)_i sign((S r)_i) ] = q.r

because E[ (s.q) sign(s.r) ] = sqrt(2/pi) q.r / |r|. TurboQuant_prod sketches the residual of a (b-1)-bit
code. Source: QJL, arXiv 2406.03482, Lemma 3.2; TurboQuant, arXiv 2504.19874, Algorithm 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantpress.kept import kept
from quantpress.quantization.numerics import exact_product

SQRT_HALF_PI = math.sqrt(math.pi / 2)


def sketch_matrix(
    dim: int, seed: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The matrix S of a seed, [D, D] of independent N(0, 1) entries. Cached and shared: do not write to it.

    Args:
        dim: D.
        seed: seed of the entries. They are drawn in float64 on the CPU and then cast, so they are the same on
            every device.
        device: device of the matrix; the CPU when None.
        dtype: its floating dtype.
    """
    return _cast_matrix(dim, seed, torch.device("cpu" if device is None else device), dtype)


def sketch(residual: Tensor, matrix: Tensor) -> Tensor:
    """Signs of S r, [..., D] of +1 and -1 in r's dtype; 0 counts as +1.

    Args:
        residual: r, [..., D] floating.
        matrix: S, [D, D].
    """
    projected = exact_product(residual, matrix.T)
    return torch.where(projected < 0, -1.0, 1.0).to(residual.dtype)


def decode_sketch(signs: Tensor, norm: Tensor, matrix: Tensor) -> Tensor:
    """The vector whose inner product with q is the unbiased estimate of q.r.

    Args:
        signs: [..., D] of +1 and -1.
        norm: [...] norms |r| of the sketched vectors.
        matrix: S, [D, D].

    Returns:
        sqrt(pi/2) / D * |r| * S^T signs, [..., D].
    """
    return exact_product(signs, matrix) * (norm * (SQRT_HALF_PI / matrix.shape[0]))[..., None]


def sketch_variance(residual_norm: float, query_norm: float, cosine: float, dim: int) -> float:
    """Variance over S of the estimate of q.r.

    It is |q|^2 |r|^2 (pi/2 - cos^2) / D, with the cosine between q and r: each of the D rows adds (s.q)^2,
    whose mean is |q|^2, less the square of its own mean.

    Args:
        residual_norm: |r|.
        query_norm: |q|.
        cosine: q.r / (|q| |r|).
        dim: D, the number of signs in the sketch.
    """
    return (residual_norm * query_norm) ** 2 * (math.pi / 2 - cosine**2) / dim


@kept
def _cast_matrix(dim: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Cached: a tensor made under inference_mode could not be used under autograd later.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(dim, dim, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
