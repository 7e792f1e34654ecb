"""The sketch's estimate: unbiased over its matrix, with the variance that theory states."""

import math

import pytest
import torch
from torch import Tensor

from quantpress.quantization.bounds import lloyd_max_distortion, paper_product_bound
from quantpress.quantization.codebook import codebook
from quantpress.quantization.qjl import decode_sketch, sketch, sketch_matrix, sketch_variance
from quantpress.quantization.rotation import Rotation


def estimates(r: Tensor, q: Tensor, matrices: int) -> Tensor:
    """Estimates of q.r, one a matrix."""
    dim = r.shape[-1]
    found = []
    for seed in range(matrices):
        matrix = sketch_matrix(dim, seed)
        found.append(q @ decode_sketch(sketch(r, matrix), r.norm(), matrix))
    return torch.stack(found)


@pytest.mark.parametrize("cosine", [0.0, 0.6, -0.95])
def test_the_estimate_is_unbiased_and_has_the_stated_variance(cosine: float) -> None:
    dim, count = 32, 4000
    r, q = torch.zeros(2, dim, dtype=torch.float64)
    r[0] = 0.7
    q[0], q[1] = 2 * cosine, 2 * math.sqrt(1 - cosine**2)
    found = estimates(r, q, count)
    variance = sketch_variance(0.7, 2.0, cosine, dim)
    assert found.mean().item() == pytest.approx(1.4 * cosine, abs=4 * math.sqrt(variance / count))
    assert found.var().item() == pytest.approx(variance, rel=0.12)


def test_signs_are_plus_and_minus_one_and_zero_counts_as_plus() -> None:
    matrix = sketch_matrix(16, 0)
    signs = sketch(
        torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64), matrix
    )
    assert signs.abs().eq(1).all() and 0 < signs.eq(1).sum() < signs.numel()
    assert sketch(torch.zeros(16, dtype=torch.float64), matrix).eq(1).all()
    assert not decode_sketch(signs, torch.zeros(5, dtype=torch.float64), matrix).any()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_two_stage_estimate_is_unbiased_where_the_code_alone_is_not(bits: int) -> None:
    dim, count = 64, 1500
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(dim, generator=generator, dtype=torch.float64)
    u = x / x.norm()
    book = codebook(bits - 1, dim, "lloyd_max")
    coded, products = [], []
    for seed in range(count):
        rotation, matrix = Rotation(dim, "haar", seed), sketch_matrix(dim, seed + 10**6)
        y = rotation.forward(u)
        code = book.dequantize(book.quantize(y), torch.float64)
        residual = y - code
        both = code + decode_sketch(sketch(residual, matrix), residual.norm(), matrix)
        coded.append((y @ code).item())
        products.append((y @ both).item())
    coded_mean, measured = sum(coded) / count, torch.tensor(products)
    standard_error = measured.std().item() / math.sqrt(count)
    assert measured.mean().item() == pytest.approx(1.0, abs=4 * standard_error)
    # A centroid code shrinks every inner product by its distortion (TurboQuant, section 3.2).
    assert coded_mean == pytest.approx(1 - lloyd_max_distortion(bits - 1, dim), abs=0.01)
    assert measured.var().item() < paper_product_bound(bits, dim)


def test_the_matrix_is_cached_cast_and_fixed_by_its_seed() -> None:
    assert sketch_matrix(48, 5) is sketch_matrix(48, 5)
    assert torch.equal(sketch_matrix(48, 5, dtype=torch.float32), sketch_matrix(48, 5).float())
    assert not torch.equal(sketch_matrix(48, 5), sketch_matrix(48, 6))
