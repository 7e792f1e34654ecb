"""The coordinate density against numerical integration and against random unit vectors."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from quantpress.errors import UnsupportedHeadDimError
from quantpress.quantization.density import CoordinateDensity

DIMS = [3, 4, 5, 32, 64, 80, 128, 256, 1024]


@pytest.mark.parametrize("dim", DIMS)
def test_the_density_integrates_to_one_with_second_moment_one_over_d(dim: int) -> None:
    density = CoordinateDensity(dim)
    total, _ = integrate.quad(density.pdf, -1, 1, epsabs=1e-13, points=[0.0])
    power, _ = integrate.quad(lambda x: x * x * density.pdf(x), -1, 1, epsabs=1e-13, points=[0.0])
    assert total == pytest.approx(1.0, abs=1e-10)
    assert power == pytest.approx(1.0 / dim, rel=1e-9)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("cell", [(0.0, 0.02), (0.05, 0.1), (0.1, 0.5)], ids=str)
def test_mass_and_first_moment_are_the_integrals_over_a_cell(dim: int, cell: tuple[float, float]) -> None:
    density = CoordinateDensity(dim)
    low, high = np.array([cell[0]]), np.array([cell[1]])
    mass, _ = integrate.quad(density.pdf, *cell, epsabs=0, epsrel=1e-11)
    moment, _ = integrate.quad(lambda x: x * density.pdf(x), *cell, epsabs=0, epsrel=1e-11)
    assert density.mass(low, high)[0] == pytest.approx(mass, rel=1e-8)
    assert density.first_moment(low, high)[0] == pytest.approx(moment, rel=1e-8)


def test_dimension_two_integrates_to_one_although_its_density_is_infinite_at_the_ends() -> None:
    density = CoordinateDensity(2)
    edges = np.array([0.0, 0.5, 1.0])
    # X = cos(angle) of a uniform angle: P(X > 1/2) is a third.
    assert density.mass(edges[:-1], edges[1:]) == pytest.approx([1 / 6, 1 / 3], abs=1e-12)
    assert density.first_moment(edges[:1], edges[-1:])[0] == pytest.approx(1 / np.pi, abs=1e-12)


@pytest.mark.parametrize("dim", [3, 64, 128])
def test_coordinates_of_random_unit_vectors_follow_the_density(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    vectors = torch.randn(5000, dim, generator=generator, dtype=torch.float64)
    first = (vectors / vectors.norm(dim=-1, keepdim=True))[:, 0].abs().numpy()
    density = CoordinateDensity(dim)
    result = stats.kstest(first, lambda x: 2 * density.mass(np.zeros_like(x), np.asarray(x)))
    assert result.pvalue > 1e-3


@pytest.mark.parametrize("dim", [1, 0, -3])
def test_too_small_a_dimension_is_refused_by_value(dim: int) -> None:
    with pytest.raises(UnsupportedHeadDimError, match=f"at least 2, got {dim}"):
        CoordinateDensity(dim)
