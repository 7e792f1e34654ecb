"""Rotations: orthogonal, deterministic, of every dimension, and spreading energy as the codebooks assume."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.errors import InvalidInputError
from quantpress.quantization.codebook import codebook
from quantpress.quantization.rotation import Rotation

DIMS = [1, 2, 3, 4, 12, 32, 64, 80, 96, 112, 128, 160, 192, 256, 576]
KINDS = ["hadamard", "haar", "identity"]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_matrix_is_orthogonal(kind: str, dim: int) -> None:
    matrix = Rotation(dim, kind, seed=3).matrix()
    assert matrix.shape == (dim, dim) and matrix.dtype == torch.float64
    eye = torch.eye(dim, dtype=torch.float64)
    assert torch.allclose(matrix @ matrix.T, eye, atol=1e-12, rtol=0)
    assert torch.allclose(matrix.T @ matrix, eye, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_x_times_the_transpose_and_inverse_undoes_it(kind: str, dim: int) -> None:
    rotation = Rotation(dim, kind, seed=1)
    x = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = rotation.forward(x)
    assert torch.allclose(y, torch.einsum("ij,...j->...i", rotation.matrix(), x), atol=1e-12)
    assert torch.allclose(rotation.inverse(y), x, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    dim=st.integers(1, 96),
    kind=st.sampled_from(["hadamard", "haar"]),
    seed=st.integers(0, 2**62 - 1),
    scale=st.floats(1e-3, 1e3),
)
def test_norms_and_inner_products_are_kept(dim: int, kind: str, seed: int, scale: float) -> None:
    rotation = Rotation(dim, kind, seed)
    x, y = torch.randn(2, 4, dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * scale
    products = (rotation.forward(x) * rotation.forward(y)).sum(-1)
    assert torch.allclose(products, (x * y).sum(-1), rtol=1e-9, atol=1e-11 * scale**2 * dim)
    assert torch.allclose(rotation.forward(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12)


@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_a_power_of_two_has_entries_of_one_magnitude(dim: int) -> None:
    assert torch.allclose(Rotation(dim).matrix().abs(), torch.full((), dim**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("dim", [80, 96, 112, 160, 192])
def test_other_dimensions_have_no_entry_above_sqrt_two_of_the_mean_magnitude(dim: int) -> None:
    assert Rotation(dim).matrix().abs().max() <= (2 / dim) ** 0.5 + 1e-12


@pytest.mark.parametrize("kind", ["hadamard", "haar"])
def test_the_seed_fixes_the_matrix_whatever_the_global_state(kind: str) -> None:
    from quantpress.quantization.rotation import _exact_matrix

    first = Rotation(96, kind, seed=7).matrix().clone()
    _exact_matrix.cache_clear()
    torch.manual_seed(123)
    torch.rand(5)
    assert torch.equal(_exact_matrix(Rotation(96, kind, seed=7)), first)
    assert not torch.allclose(Rotation(96, kind, seed=8).matrix(), first)


def test_building_a_matrix_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    Rotation(48, "haar", seed=991).matrix()
    assert torch.equal(torch.rand(4), expected)


def test_signs_of_a_known_seed_stay_what_saved_caches_were_written_with() -> None:
    signs = (Rotation(16, "hadamard", seed=0).matrix()[0] > 0).int().tolist()
    assert signs == [0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0]


def test_a_matrix_made_in_inference_mode_serves_autograd_later() -> None:
    rotation = Rotation(64, seed=4242)
    with torch.inference_mode():
        rotation.forward(torch.ones(64))
    x = torch.ones(64, requires_grad=True)
    rotation.forward(x)[0].backward()
    assert x.grad is not None and torch.allclose(x.grad, rotation.matrix(dtype=torch.float32)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_input_is_rotated_in_float32(dtype: torch.dtype) -> None:
    rotation = Rotation(128)
    x = torch.randn(10, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert rotation.forward(x).dtype == torch.float32
    assert torch.equal(rotation.forward(x), rotation.forward(x.float()))


def test_the_default_dtype_and_device_do_not_change_the_matrix() -> None:
    expected = Rotation(80, seed=11).matrix().clone()
    from quantpress.quantization.rotation import _exact_matrix

    _exact_matrix.cache_clear()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            assert torch.equal(_exact_matrix(Rotation(80, seed=11)), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_hadamard_brings_uneven_channels_to_the_codebook_s_distortion_or_below(spread: float) -> None:
    dim, generator = 128, torch.Generator().manual_seed(0)
    channels = (spread * torch.randn(dim, generator=generator)).exp()
    x = torch.randn(4000, dim, generator=generator) * channels
    book = codebook(3, dim, "lloyd_max")

    def distortion(kind: str) -> float:
        y = Rotation(dim, kind).forward(x)
        u = y / y.norm(dim=-1, keepdim=True)
        return (u - book.dequantize(book.quantize(u))).square().sum(-1).mean().item()

    assert distortion("hadamard") < 1.01 * book.distortion
    assert distortion("identity") > 2 * book.distortion


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 64, "kind": "givens"}, "'givens'; use one of hadamard, haar, identity"),
        ({"dim": 0}, "at least 1, got 0"),
        ({"dim": 64, "seed": -1}, "got -1"),
        ({"dim": 64, "seed": 2**62}, "0 to 2\\*\\*62 - 1"),
    ],
    ids=["kind", "dim", "negative seed", "large seed"],
)
def test_wrong_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Rotation(**arguments)  # type: ignore[arg-type]


def test_a_tensor_of_another_width_or_of_integers_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"dim 64 cannot take a tensor of shape \(2, 63\)"):
        Rotation(64).forward(torch.zeros(2, 63))
    with pytest.raises(InvalidInputError, match=r"torch\.int64; convert"):
        Rotation(4).inverse(torch.zeros(2, 4, dtype=torch.int64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 80])
def test_the_matrix_lies_by_rows(kind: str, dim: int) -> None:
    """Kernels are given its address."""
    for dtype in (torch.float64, torch.float32):
        assert Rotation(dim, kind, seed=3).matrix(dtype=dtype).is_contiguous()
