"""Codebooks against the mathematics that defines them, and against random unit vectors."""

import numpy as np
import pytest
import torch
from scipy import integrate

from quantpress.errors import InvalidInputError, UnsupportedBitsError, UnsupportedHeadDimError
from quantpress.quantization.codebook import _shipped, codebook, compute_codebook, lloyd_max
from quantpress.quantization.density import CoordinateDensity
from tests.grids import covering

FORMS = ["int8", "lloyd_max"]
EXACT = {  # mean squared error of a unit vector on the exact sphere, 1 to 5 bits
    64: [0.358387, 0.114526, 0.033391, 0.009132, 0.002399],
    128: [0.360889, 0.116000, 0.033966, 0.009315, 0.002452],
    256: [0.362136, 0.116740, 0.034256, 0.009408, 0.002478],
}
ALL = [
    (form, bits, dim) for form in FORMS for bits in (1, 2, 3, 4, 8) for dim in (4, 20, 64, 80, 128, 256, 1000)
]


def unit_vectors(count: int, dim: int, seed: int) -> torch.Tensor:
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("dim", EXACT)
def test_lloyd_max_reaches_the_known_distortions(dim: int) -> None:
    measured = [codebook(bits, dim, "lloyd_max").distortion for bits in range(1, 6)]
    assert measured == pytest.approx(EXACT[dim], abs=6e-7)


@pytest.mark.parametrize("dim", [3, 12, 64, 80, 128, 1024])
@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_the_centroids_of_their_cells(bits: int, dim: int) -> None:
    levels = lloyd_max(bits, dim).numpy() / dim**0.5
    assert levels.shape == (2**bits,) and np.all(np.diff(levels) > 0)
    half = levels[2 ** (bits - 1) :]
    edges = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [1.0]])
    density = CoordinateDensity(dim)
    centroids = density.first_moment(edges[:-1], edges[1:]) / density.mass(edges[:-1], edges[1:])
    assert np.abs(centroids - half).max() < 1e-9 * half[-1]


def test_dimension_three_is_uniform_so_its_levels_are_evenly_spaced() -> None:
    levels = lloyd_max(3, 3) / 3**0.5
    assert levels.tolist() == pytest.approx(
        [-7 / 8, -5 / 8, -3 / 8, -1 / 8, 1 / 8, 3 / 8, 5 / 8, 7 / 8], abs=1e-12
    )


def test_large_dimensions_come_close_to_max_s_gaussian_table() -> None:
    # Max 1960, table I, 4 and 8 levels of a unit Gaussian.
    assert lloyd_max(2, 20000)[2:].tolist() == pytest.approx([0.4528, 1.510], abs=1e-3)
    assert lloyd_max(3, 20000)[4:].tolist() == pytest.approx([0.2451, 0.7560, 1.344, 2.152], abs=1e-3)


@pytest.mark.parametrize(("form", "bits", "dim"), ALL)
def test_levels_are_symmetric_and_thresholds_their_midpoints(form: str, bits: int, dim: int) -> None:
    book = codebook(bits, dim, form)
    assert len(book.levels) == 2**bits and len(book.thresholds) == 2**bits - 1
    assert all(book.levels[i] == -book.levels[-1 - i] for i in range(2**bits))
    assert list(book.levels) == sorted(set(book.levels))
    assert list(book.thresholds) == [(a + b) / 2 for a, b in zip(book.levels, book.levels[1:], strict=False)]
    assert list(book.levels) == [value * book.unit for value in book.scaled]
    assert book.thresholds[2 ** (bits - 1) - 1] == 0.0


@pytest.mark.parametrize(("form", "bits", "dim"), [case for case in ALL if case[2] in (20, 80, 256)])
def test_the_stated_distortion_is_the_integral(form: str, bits: int, dim: int) -> None:
    book = codebook(bits, dim, form)
    density = CoordinateDensity(dim)
    edges = [-1.0, *book.thresholds, 1.0]
    total = 0.0
    for level, low, high in zip(book.levels, edges, edges[1:], strict=False):
        total += integrate.quad(
            lambda x, level=level: (x - level) ** 2 * density.pdf(x), low, high, epsabs=1e-14, limit=200
        )[0]
    assert dim * total == pytest.approx(book.distortion, rel=1e-6)


@pytest.mark.parametrize("dim", [4, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_int8_levels_are_odd_and_pass_through_a_signed_byte_unchanged(bits: int, dim: int) -> None:
    book = codebook(bits, dim, "int8")
    scaled = torch.tensor(book.scaled, dtype=torch.float64)
    stored = ((scaled - 1) / 2).to(torch.int8)
    assert torch.equal(2 * stored.double() + 1, scaled)
    assert 64 <= scaled.max() <= 255


@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize(("bits", "cost"), [(1, 1e-12), (2, 1e-6), (3, 5e-5), (4, 6e-4)])
def test_int8_costs_almost_nothing(bits: int, cost: float, dim: int) -> None:
    optimum = codebook(bits, dim, "lloyd_max").distortion
    assert optimum * (1 - 1e-12) <= codebook(bits, dim, "int8").distortion <= optimum * (1 + cost)


@pytest.mark.parametrize(("dim", "cost"), [(32, 0.83), (64, 0.97), (128, 1.05), (256, 1.09)])
def test_int8_at_8_bits_has_the_best_of_all_even_steps(dim: int, cost: float) -> None:
    """Against levels and thresholds of a plain rounding, integrated numerically; it costs what is stated."""
    book, optimum = codebook(8, dim), codebook(8, dim, "lloyd_max").distortion
    assert np.array_equal(np.diff(book.scaled), np.full(255, 2.0)) and book.scaled[-1] == 255
    x = np.linspace(-1, 1, 2_000_001)
    weight = CoordinateDensity(dim).pdf(x) * dim * (x[1] - x[0])

    def error(unit: float) -> float:
        level = 2 * np.clip(np.floor(x / (2 * unit)), -128, 127) + 1
        return float(np.dot(weight, (x - level * unit) ** 2))

    assert error(book.unit) == pytest.approx(book.distortion, rel=1e-5)
    assert min(error(book.unit * step) for step in (0.9, 0.99, 0.999, 1.001, 1.01, 1.1)) > error(book.unit)
    assert book.distortion == pytest.approx(optimum * (1 + cost), rel=0.005)


@pytest.mark.parametrize(("bits", "dim"), [(2, 128), (3, 64), (4, 128)])
def test_no_unit_of_a_finer_search_beats_the_int8_unit(bits: int, dim: int) -> None:
    half = lloyd_max(bits, dim).numpy()[2 ** (bits - 1) :] / dim**0.5
    density = CoordinateDensity(dim)
    best = np.inf
    for top in np.geomspace(64, 255, 15013):
        unit = half[-1] / top
        odd = 2 * np.floor(half / unit / 2) + 1
        best = min(best, density.distortion(odd * unit))
    assert codebook(bits, dim, "int8").distortion <= best * (1 + 1e-9)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_neighbour_of_the_int8_pattern_is_better(bits: int, dim: int) -> None:
    book, density = codebook(bits, dim, "int8"), CoordinateDensity(dim)
    half = np.array(book.scaled[2 ** (bits - 1) :])
    for place in range(len(half)):
        for step in (-2.0, 2.0):
            moved = half.copy()
            moved[place] += step
            for unit in book.unit * np.linspace(0.98, 1.02, 41):
                assert moved.max() > 255 or density.distortion(moved * unit) >= book.distortion


@pytest.mark.parametrize(
    ("bits", "dim", "form"), covering([1, 2, 3, 4], [64, 128, 256], ["lloyd_max", "int8"])
)
def test_random_unit_vectors_have_the_optimal_distortion(bits: int, dim: int, form: str) -> None:
    limit = {"lloyd_max": 0.01, "int8": 0.011}[form]
    u = unit_vectors(1_500_000 // dim, dim, seed=bits)
    book = codebook(bits, dim, form)
    errors = (u - book.dequantize(book.quantize(u))).double().square().sum(-1)
    standard_error = errors.std().item() / len(errors) ** 0.5
    assert errors.mean().item() == pytest.approx(book.distortion, abs=5 * standard_error)
    assert errors.mean().item() == pytest.approx(EXACT[dim][bits - 1], rel=limit)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_quantize_picks_the_nearest_level(bits: int, form: str) -> None:
    book = codebook(bits, 64, form)
    u = unit_vectors(200, 64, seed=9).double()
    levels = book.level_tensor(dtype=torch.float64)
    nearest = (u[..., None] - levels).abs().argmin(-1)
    codes = book.quantize(u)
    assert codes.dtype == torch.uint8 and torch.equal(codes.long(), nearest)
    assert torch.equal(book.dequantize(codes, torch.float64), levels[nearest])


def test_a_value_on_a_threshold_takes_the_lower_code() -> None:
    book = codebook(2, 64)
    assert book.quantize(torch.tensor(book.thresholds, dtype=torch.float64)).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("bits", "dim", "form", "error", "message"),
    [
        (5, 64, "int8", UnsupportedBitsError, "got 5; use one of them or form='lloyd_max'"),
        (9, 64, "lloyd_max", UnsupportedBitsError, "1 to 8 bits, got 9"),
        (0, 64, "int8", UnsupportedBitsError, "1 to 8 bits, got 0"),
        (2.5, 64, "int8", UnsupportedBitsError, "got 2.5"),
        (4, 1, "lloyd_max", UnsupportedHeadDimError, "at least 2, got 1"),
        (4, 64, "nf4", InvalidInputError, "'nf4'; use one of int8, lloyd_max"),
    ],
)
def test_wrong_arguments_are_named(
    bits: int, dim: int, form: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        codebook(bits, dim, form)


def test_a_dimension_outside_the_table_is_computed() -> None:
    assert "int8/3/1000" not in _shipped()
    assert codebook(3, 1000) == compute_codebook(3, 1000, "int8")


def test_a_cached_codebook_does_not_let_a_float_or_a_bool_through() -> None:
    codebook(4, 64), codebook(1, 64)
    with pytest.raises(UnsupportedBitsError, match=r"got 4\.0"):
        codebook(4.0, 64)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedBitsError, match="got True"):
        codebook(True, 64)
