"""Decoding: exactly scale times level, the distortion that theory gives, and estimators without bias."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantpress.kernels.dequantize.reference as reference
from quantpress.errors import InvalidInputError
from quantpress.kernels.dequantize import decode_code_space, decode_pages, from_code_space, to_code_space
from quantpress.kernels.encode import encode_pages
from quantpress.kernels.layout import PAGE_TOKENS, unpack_pages
from quantpress.quantization.bounds import lloyd_max_distortion
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, key_statistics, value_statistics
from tests.grids import covering

IDENTITY = ChannelTransform()
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 576)
FLOAT32 = 2e-6  # relative error of a rotation in float32


def unit_vectors(count: int, dim: int) -> torch.Tensor:
    """[1, 1, T, D] of uniform direction and length 1."""
    x = torch.randn(1, 1, count, dim, dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True)).float()


def round_trip(x: torch.Tensor, spec: CodecSpec) -> torch.Tensor:
    return decode_pages(encode_pages(x, spec, IDENTITY), spec, IDENTITY, torch.float32)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# What a plane says


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 2.5, 3.5])
@pytest.mark.parametrize("dim", [64, 80])
def test_code_space_is_scale_times_level_to_the_last_bit(dim: int, bits: float, role: str) -> None:
    spec = CodecSpec(dim, bits, role)
    planes = encode_pages(torch.randn(2, 3, 4 * PAGE_TOKENS, dim), spec, IDENTITY)
    parts = []
    for i, group in enumerate(spec.groups):
        codes = unpack_pages(planes[f"codes{i}"], group.bits, group.channels, role)
        parts.append(spec.codebook_of(i).dequantize(codes) * planes[f"scale{i}"].float().unsqueeze(-1))
    expected = torch.cat(parts, dim=-1).flatten(2, 3)
    got = decode_code_space(planes, spec)
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    assert (got if role == "key" else got.transpose(-1, -2)).is_contiguous()


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", [2, 3, 3.5, 8])
def test_chunks_and_views_do_not_show(bits: float, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CodecSpec(64, bits, role)
    planes = encode_pages(torch.randn(2, 3, 5 * PAGE_TOKENS, 64), spec, IDENTITY)
    whole = decode_code_space(planes, spec)
    some = {name: plane[1:, :, 1:4] for name, plane in planes.items()}  # as a growing store hands them out
    assert torch.equal(decode_code_space(some, spec), whole[1:, :, PAGE_TOKENS : 4 * PAGE_TOKENS])
    for pages in (1, 2, 7):
        monkeypatch.setattr(reference, "WORKSPACE_VALUES", pages * PAGE_TOKENS * 64)
        assert torch.equal(decode_code_space(planes, spec), whole)
        assert torch.equal(decode_code_space(some, spec), whole[1:, :, PAGE_TOKENS : 4 * PAGE_TOKENS])


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_sketch_is_added_as_published(bits: int, role: str) -> None:
    spec = CodecSpec(96, bits, role, estimator="prod")
    x = torch.randn(1, 2, 2 * PAGE_TOKENS, 96)
    planes = encode_pages(x, spec, IDENTITY)
    codes = unpack_pages(planes["codes0"], bits - 1, 96, role).flatten(2, 3).numpy()
    coded = (
        np.array(spec.codebook_of(0).levels)[codes]
        * planes["scale0"].flatten(2, 3).double().numpy()[..., None]
    )
    sketch = spec.sketch_matrix().numpy()
    y = x.double().numpy() @ spec.rotation_of(0).matrix().numpy().T
    projected = (y - coded) @ sketch.T
    signs = 2.0 * unpack_pages(planes["sketch"], 1, 96, role).flatten(2, 3).numpy() - 1
    clear = np.abs(projected) > 1e-4
    assert (signs == np.sign(projected))[clear].all() and clear.mean() > 0.999
    norm = planes["residual"].flatten(2, 3).double().numpy()
    assert np.abs(norm / np.linalg.norm(y - coded, axis=-1) - 1).max() < 2**-10
    expected = coded + math.sqrt(math.pi / 2) / 96 * norm[..., None] * (signs @ sketch)
    assert relative_error(decode_code_space(planes, spec), torch.from_numpy(expected)) < FLOAT32


# Code space


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [4, 2.5])
def test_code_space_keeps_inner_products_and_leads_back(dim: int, bits: float) -> None:
    spec = CodecSpec(dim, bits, "key")
    x, q = torch.randn(2, 3, 7, dim), torch.randn(2, 3, 5, dim)
    y = to_code_space(x, spec)
    assert relative_error(from_code_space(y, spec), x) < FLOAT32
    assert relative_error(to_code_space(q, spec) @ y.mT, q @ x.mT) < 2 * FLOAT32
    assert relative_error(y, x) > 0.5  # it is another space


@pytest.mark.parametrize("bits", [4, 2.5])
@pytest.mark.parametrize("role", ["key", "value"])
def test_scores_in_code_space_are_scores_of_decoded_vectors(role: str, bits: float) -> None:
    spec = CodecSpec(64, bits, role)
    x = torch.randn(2, 3, 2 * PAGE_TOKENS, 64) * torch.rand(64).exp() + torch.randn(64)
    moment = torch.rand(2, 3, 64) + 0.1
    transform = key_statistics(x, moment, spec.groups) if role == "key" else value_statistics(x, spec.groups)
    planes = encode_pages(x, spec, transform)
    q = torch.randn(2, 3, 4, 5, 64)
    scores = to_code_space(transform.query(q), spec) @ decode_code_space(planes, spec).mT.unsqueeze(2)
    scores += transform.bias(q).unsqueeze(-1)
    decoded = decode_pages(planes, spec, transform, torch.float64)
    assert relative_error(scores, q.double() @ decoded.mT.unsqueeze(2)) < 1e-5
    assert relative_error(decoded, x) < 0.5


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_decoded_vectors_are_rotated_back(dim: int, role: str) -> None:
    x = torch.zeros(1, 1, PAGE_TOKENS, dim)
    x[0, 0, torch.arange(PAGE_TOKENS), torch.arange(PAGE_TOKENS) % dim] = 3.0
    decoded = round_trip(x, CodecSpec(dim, 4, role))
    assert torch.equal(decoded.argmax(-1), x.argmax(-1))
    assert torch.nn.functional.cosine_similarity(decoded, x, dim=-1).min() > 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_decoded_dtype(dtype: torch.dtype) -> None:
    spec = CodecSpec(64, 4, "value")
    planes = encode_pages(torch.randn(1, 1, PAGE_TOKENS, 64), spec, IDENTITY)
    decoded = decode_pages(planes, spec, IDENTITY, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, decode_pages(planes, spec, IDENTITY, torch.float32).to(dtype))


# How exact it is


@pytest.mark.parametrize(
    ("dim", "bits", "form"), covering([64, 128, 256], [1, 2, 3, 4], ["lloyd_max", "int8"])
)
def test_distortion_is_the_exact_optimum(dim: int, bits: int, form: str) -> None:
    room = {"lloyd_max": 0.01, "int8": 0.011}[form]
    x = unit_vectors(128 * PAGE_TOKENS, dim)
    role = "key" if bits % 2 else "value"
    decoded = round_trip(x, CodecSpec(dim, bits, role, codebook=form, scale="norm"))
    measured = float((x - decoded).double().square().sum(-1).mean())
    assert measured == pytest.approx(lloyd_max_distortion(bits, dim), rel=room)


@pytest.mark.parametrize(("bits", "expected"), [(2.5, 0.0740), (3.5, 0.0213)])
def test_split_channels_have_the_mean_distortion_of_their_groups(bits: float, expected: float) -> None:
    x = unit_vectors(64 * PAGE_TOKENS, 128)
    measured = (x - round_trip(x, CodecSpec(128, bits, "key", scale="norm"))).double().square().sum(-1).mean()
    assert float(measured) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_outlier_channels_get_the_wider_code(bits: float) -> None:
    spec = CodecSpec(64, bits, "key")
    loud = torch.rand(2, 3, 64).argsort(-1) < 32  # every head has its own outliers
    x = torch.randn(2, 3, 4 * PAGE_TOKENS, 64) * (1 + 9 * loud.float()).unsqueeze(2)
    transform = key_statistics(x, None, spec.groups, mean=False)
    decoded = decode_pages(encode_pages(x, spec, transform), spec, transform, torch.float32)
    split = ((x - decoded).square() * loud.unsqueeze(2)).sum() / (x.square() * loud.unsqueeze(2)).sum()
    assert float(split) == pytest.approx(lloyd_max_distortion(math.ceil(bits), 32), rel=0.1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("scale_dtype", "room"), [("float32", 2e-6), ("float16", 2**-10)])
def test_norm_corrected_codes_keep_the_norm(bits: int, scale_dtype: str, room: float) -> None:
    x = torch.randn(1, 2, 2 * PAGE_TOKENS, 128)
    decoded = round_trip(x, CodecSpec(128, bits, "key", scale="norm_corrected", scale_dtype=scale_dtype))
    assert (decoded.norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < room


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("scale_dtype", "room"), [("float32", 2e-6), ("float16", 2**-10)])
def test_unbiased_codes_project_onto_the_vector_exactly(bits: int, scale_dtype: str, room: float) -> None:
    x = torch.randn(1, 2, 2 * PAGE_TOKENS, 128)
    decoded = round_trip(x, CodecSpec(128, bits, "value", scale="unbiased", scale_dtype=scale_dtype))
    assert ((x * decoded).sum(-1) / x.square().sum(-1) - 1).abs().max() < room


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_plain_codes_shrink_by_their_distortion(bits: int) -> None:
    """A stray factor (sqrt(2), a forgotten 1 / sqrt(D)) shows here at once."""
    x = unit_vectors(32 * PAGE_TOKENS, 128)
    decoded = round_trip(x, CodecSpec(128, bits, "key", codebook="lloyd_max", scale="norm"))
    kept = 1 - lloyd_max_distortion(bits, 128)
    assert float((x * decoded).sum(-1).mean()) == pytest.approx(kept, rel=0.01)
    assert float(decoded.square().sum(-1).mean()) == pytest.approx(kept, rel=0.01)


def estimates(
    bits: int, estimator: str, scale: str, x: torch.Tensor, q: torch.Tensor, seeds: int
) -> torch.Tensor:
    """Estimates of q.x, [seeds, T], a fresh rotation and sketch each."""
    found = []
    for seed in range(seeds):
        spec = CodecSpec(
            x.shape[-1], bits, "key", rotation="haar", seed=seed, estimator=estimator, scale=scale
        )
        planes = encode_pages(x, spec, IDENTITY)
        found.append((to_code_space(q, spec) @ decode_code_space(planes, spec).mT).flatten())
    return torch.stack(found)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_prod_is_unbiased_over_its_seeds(bits: int) -> None:
    dim, seeds = 32, 300
    x = unit_vectors(PAGE_TOKENS, dim)
    q = 0.8 * x[:, :, :1] + 0.6 * unit_vectors(1, dim)
    found = estimates(bits, "prod", "norm", x, q, seeds).double()
    exact = (q.double() @ x.double().mT).flatten()
    deviation = (found.mean(0) - exact) / (found.std(0) / math.sqrt(seeds))
    assert deviation.square().mean() < 1.9  # 1 if unbiased; its own spread over 128 vectors is about 0.15
    assert deviation.abs().max() < 6


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_sketch_has_four_to_six_times_the_variance_of_a_rescaled_code(bits: int) -> None:
    dim, seeds = 128, 24
    x, q = unit_vectors(8 * PAGE_TOKENS, dim), unit_vectors(64, dim)
    exact = (q @ x.mT).flatten()
    sketched = (estimates(bits, "prod", "norm", x, q, seeds) - exact).square().mean()
    rescaled = (estimates(bits, "mse", "unbiased", x, q, seeds) - exact).square().mean()
    ratio = float(sketched / rescaled)
    expected = math.pi / 2 * lloyd_max_distortion(bits - 1, dim) / lloyd_max_distortion(bits, dim)
    assert 4 < ratio < 6
    assert ratio == pytest.approx(expected * (1 - lloyd_max_distortion(bits, dim)), rel=0.04)


@settings(max_examples=40)
@given(
    head_dim=st.integers(2, 24).map(lambda n: 4 * n),
    bits=st.sampled_from([1, 2, 3, 4, 8, 1.5, 2.5, 3.25]),
    role=st.sampled_from(["key", "value"]),
    scale=st.sampled_from(["auto", "norm", "norm_corrected", "unbiased"]),
    rotation=st.sampled_from(["hadamard", "haar"]),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 2)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_codec_brings_vectors_back(
    head_dim: int, bits: float, role: str, scale: str, rotation: str, shape: tuple[int, int, int], seed: int
) -> None:
    spec = CodecSpec(head_dim, bits, role, rotation, seed, scale)
    batch, heads, pages = shape
    x = torch.randn(batch, heads, pages * PAGE_TOKENS, head_dim)
    planes = encode_pages(x, spec, IDENTITY)
    decoded = decode_pages(planes, spec, IDENTITY, torch.float32)
    assert decoded.shape == x.shape
    held = sum(plane.numel() * plane.element_size() for plane in planes.values())
    assert 8 * held == pytest.approx(spec.bits_per_value * x.numel())
    if pages:
        narrow, bound = math.floor(bits), math.sqrt(3) * math.pi / 2 * 4.0 ** -math.floor(bits)
        if narrow == 8:  # levels are evenly spaced: one vector beyond the last outweighs all others
            of_each = (decoded - x).square().sum(-1) / x.square().sum(-1)
            assert float(of_each.median()) < 3.0 * bound
        else:
            assert relative_error(decoded, x) ** 2 < 2.2 * bound


# On a device


@pytest.mark.gpu
@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize(
    ("bits", "estimator"),
    [(1, "mse"), (2, "mse"), (3, "mse"), (4, "mse"), (8, "mse"), (2.5, "mse"), (3, "prod")],
)
def test_a_device_decodes_what_the_cpu_packed(bits: float, estimator: str, role: str) -> None:
    spec = CodecSpec(80, bits, role, estimator=estimator)
    x = torch.randn(2, 3, 2 * PAGE_TOKENS, 80)
    planes = encode_pages(x, spec, IDENTITY)
    moved = {name: plane.cuda() for name, plane in planes.items()}
    got, expected = decode_code_space(moved, spec).cpu(), decode_code_space(planes, spec)
    assert torch.equal(got, expected) if estimator == "mse" else relative_error(got, expected) < 1e-5
    there = encode_pages(x.cuda(), spec, IDENTITY)
    for name, plane in planes.items():
        apart = there[name].cpu() != plane  # near ties
        if plane.dtype != torch.uint8:  # a scale's last bit may differ anywhere, a code at a tie moves it
            apart = (there[name].cpu().double() - plane.double()).abs() > 2e-3 * plane.double().abs()
        assert apart.float().mean() < 2e-3
    assert relative_error(decode_code_space(there, spec).cpu(), expected) < 2e-2


# What it refuses


def test_planes_of_another_codec_are_refused() -> None:
    planes = encode_pages(torch.randn(1, 2, 2 * PAGE_TOKENS, 64), CodecSpec(64, 4, "key"), IDENTITY)
    with pytest.raises(InvalidInputError, match="codes1"):
        decode_code_space(planes, CodecSpec(64, 3.5, "key"))
    with pytest.raises(InvalidInputError, match="sketch"):
        decode_code_space(planes, CodecSpec(64, 4, "key", estimator="prod"))
    with pytest.raises(InvalidInputError, match="codes0"):
        decode_code_space(planes, CodecSpec(64, 3, "key"))
    with pytest.raises(InvalidInputError, match="scale0"):
        decode_code_space({**planes, "scale0": planes["scale0"][:, :, :1]}, CodecSpec(64, 4, "key"))
    with pytest.raises(InvalidInputError, match="scale0"):
        decode_code_space({"codes0": planes["codes0"]}, CodecSpec(64, 4, "key"))


@pytest.mark.parametrize("turn", [to_code_space, from_code_space])
def test_code_space_is_for_floats_of_the_head_dim(turn) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidInputError, match="32"):
        turn(torch.randn(2, 32), CodecSpec(64, 4, "key"))
    with pytest.raises(InvalidInputError, match="int64"):
        turn(torch.ones(2, 64, dtype=torch.int64), CodecSpec(64, 4, "key"))
