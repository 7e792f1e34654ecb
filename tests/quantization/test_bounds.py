"""Bounds: their order, and the paper's own numbers."""

import pytest

from quantpress.quantization.bounds import (
    lloyd_max_distortion,
    paper_mse_bound,
    paper_product_bound,
    shannon_distortion,
)


@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_optimum_lies_between_shannon_and_the_paper(bits: int, dim: int) -> None:
    assert shannon_distortion(bits) < lloyd_max_distortion(bits, dim) < paper_mse_bound(bits)


def test_the_paper_s_figures_are_the_optimum_cut_to_one_or_two_digits() -> None:
    # arXiv 2504.19874, Theorem 1: 0.36, 0.117, 0.03, 0.009 for 1 to 4 bits; the rest of the digits matters.
    exact = [lloyd_max_distortion(bits, 1024) for bits in (1, 2, 3, 4)]
    for value, figure, step in zip(
        exact, [0.36, 0.117, 0.03, 0.009], [0.01, 0.001, 0.01, 0.001], strict=True
    ):
        assert figure <= value < figure + step
    assert exact[2] == pytest.approx(0.034475, abs=1e-6)


def test_the_high_resolution_constant_is_reached_from_below() -> None:
    ratios = [lloyd_max_distortion(bits, 1024) / paper_mse_bound(bits) for bits in range(1, 9)]
    assert ratios == sorted(ratios) and 0.97 < ratios[-1] < 1


def test_fractions_and_constants() -> None:
    assert shannon_distortion(2.5) == pytest.approx(2.0**-5)
    assert paper_mse_bound(0) == pytest.approx(2.7207, abs=1e-4)
    assert paper_product_bound(3, 128) == pytest.approx(17.0946 / 128 / 64, rel=1e-4)
    assert paper_product_bound(3, 128, query_norm=3.0) == pytest.approx(9 * paper_product_bound(3, 128))
