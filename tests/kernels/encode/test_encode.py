"""Encoding against an independent float64 implementation in numpy, and at the edges of what a float holds."""

import re
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantpress.kernels.encode.reference as reference
from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.kernels.dequantize import decode_code_space, decode_pages
from quantpress.kernels.encode import encode_pages
from quantpress.kernels.encode.nearest import nearest_level
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes, unpack_pages
from quantpress.quantization.codebook import codebook
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from tests.grids import covering

BATCH, HEADS, PAGES = 2, 2, 2
HEAD_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 576)
NEAR_TIE = 2e-6  # float32 rotation of a unit vector moves a coordinate by less
SCALE_ROUNDING = {
    "auto": 2**-11,
    "float16": 2**-11,
    "bfloat16": 2**-8,
    "float32": 2e-6,
}  # half a unit in the last place, relative
CPU = torch.device("cpu")


def vectors(dim: int, tokens: int = PAGES * PAGE_TOKENS) -> torch.Tensor:
    """Uneven channels and lengths over ten binades, [B, Hkv, T, D]."""
    shape = (BATCH, HEADS, tokens, dim)
    return (
        torch.randn(shape) * torch.rand(dim).mul(3).exp2() * torch.rand(*shape[:3], 1).mul(10).sub(5).exp2()
    )


def transform_of(dim: int) -> ChannelTransform:
    lead = (BATCH, HEADS, dim)
    order = torch.rand(lead).argsort(-1).to(torch.int16)
    return ChannelTransform(torch.randn(lead), torch.rand(lead).add(0.5), order)


def exact_codes(
    x: torch.Tensor, spec: CodecSpec, transform: ChannelTransform, group: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64: unit vectors [B, Hkv, T, C] of one group, their norms and their codes."""
    y = x.double().numpy()
    if transform.mean is not None and transform.weight is not None and transform.order is not None:
        mean, weight = (t.double().numpy()[:, :, None] for t in (transform.mean, transform.weight))
        order = np.broadcast_to(transform.order.numpy().astype(np.int64)[:, :, None], y.shape)
        y = np.take_along_axis((y - mean) * weight, order, axis=-1)
    start = sum(g.channels for g in spec.groups[:group])
    y = y[..., start : start + spec.groups[group].channels] @ spec.rotation_of(group).matrix().numpy().T
    norm = np.sqrt((y * y).sum(-1))
    unit = y / norm[..., None]
    levels = np.array(spec.codebook_of(group).levels)
    return unit, norm, np.abs(unit[..., None] - levels).argmin(-1)


def check_against_float64(x: torch.Tensor, spec: CodecSpec, transform: ChannelTransform) -> None:
    planes = encode_pages(x, spec, transform)
    for i, group in enumerate(spec.groups):
        unit, norm, expected = exact_codes(x, spec, transform, i)
        book = spec.codebook_of(i)
        packed, scale = planes[f"codes{i}"], planes[f"scale{i}"]
        assert packed.shape == (
            *x.shape[:2],
            x.shape[2] // PAGE_TOKENS,
            page_bytes(group.bits, group.channels),
        )
        assert scale.dtype == spec.torch_scale_dtype
        codes = unpack_pages(packed, group.bits, group.channels, spec.role).flatten(2, 3).numpy()
        tie = np.abs(unit[..., None] - np.array(book.thresholds)).min(-1) < NEAR_TIE
        assert tie.mean() < 0.02
        assert (codes == expected)[~tie].all()
        levels = np.array(book.levels)[codes]
        if spec.scale_rule == "norm":
            ideal = norm
        elif spec.scale_rule == "norm_corrected":
            ideal = norm / np.sqrt((levels**2).sum(-1))
        else:
            ideal = norm / (unit * levels).sum(-1)
        stored = scale.flatten(2, 3).double().numpy()
        assert np.abs(stored / ideal - 1).max() < SCALE_ROUNDING[spec.scale_dtype] + 2e-6


@pytest.mark.parametrize(
    ("bits", "scale", "role"),
    covering([1, 2, 3, 4, 8, 2.5, 3.5], ["norm", "norm_corrected", "unbiased"], ["key", "value"]),
)
def test_codes_and_scales_are_those_of_float64(bits: float, scale: str, role: str) -> None:
    spec = CodecSpec(64, bits, role, scale=scale)
    check_against_float64(vectors(64), spec, transform_of(64))


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [3, 3.5])
def test_every_head_dim(dim: int, bits: float) -> None:
    check_against_float64(vectors(dim, PAGE_TOKENS), CodecSpec(dim, bits, "key", seed=5), transform_of(dim))


@pytest.mark.parametrize(
    ("rotation", "form", "scale_dtype"),
    covering(["hadamard", "haar", "identity"], ["int8", "lloyd_max"], ["float16", "bfloat16", "float32"]),
)
def test_every_rotation_codebook_and_scale_dtype(rotation: str, form: str, scale_dtype: str) -> None:
    spec = CodecSpec(80, 4, "value", rotation=rotation, codebook=form, scale_dtype=scale_dtype)
    check_against_float64(vectors(80, PAGE_TOKENS), spec, ChannelTransform())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_float_dtype_is_read_as_the_numbers_it_holds(dtype: torch.dtype) -> None:
    spec = CodecSpec(128, 3, "key")
    x = vectors(128).to(dtype)
    before = x.clone()
    got = encode_pages(x, spec, ChannelTransform())
    assert torch.equal(x, before)
    expected = encode_pages(x.float(), spec, ChannelTransform())
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    check_against_float64(x, spec, ChannelTransform())


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_heads_between_channels_and_tokens(estimator: Literal["mse", "prod"]) -> None:
    """As attention layers have them; without a rotation nothing makes them contiguous."""
    x = torch.randn(1, PAGE_TOKENS, 2, 64).transpose(1, 2)
    spec = CodecSpec(64, 4, "key", rotation="identity", estimator=estimator)
    got, expected = (encode_pages(one, spec, ChannelTransform()) for one in (x, x.contiguous()))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("bits", [2, 2.5, 4])
def test_chunks_do_not_show(bits: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CodecSpec(
        64, bits, "key", rotation="identity"
    )  # no matrix product, whose rounding depends on its shape
    x, transform = torch.randn(3, 2, 5 * PAGE_TOKENS, 64), ChannelTransform(torch.randn(3, 2, 64))
    whole = encode_pages(x, spec, transform)
    for budget in (
        1,
        2 * 2 * PAGE_TOKENS * 64,
        12 * 2 * PAGE_TOKENS * 64,
    ):  # a page, two pages, two sequences
        monkeypatch.setattr(reference, "WORKSPACE_VALUES", budget)
        parts = encode_pages(x, spec, transform)
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_no_tokens_make_empty_planes(estimator: str) -> None:
    spec = CodecSpec(64, 3, "key", estimator=estimator)
    planes = encode_pages(torch.empty(2, 3, 0, 64), spec, ChannelTransform())
    assert {name: plane.shape[:3] for name, plane in planes.items()} == dict.fromkeys(planes, (2, 3, 0))
    assert decode_pages(planes, spec, ChannelTransform(), torch.float16).shape == (2, 3, 0, 64)
    assert ("sketch" in planes) == (estimator == "prod")


def test_the_planes_are_all_the_memory_there_is() -> None:
    for spec in (
        CodecSpec(128, 3, "key"),
        CodecSpec(128, 3.5, "value"),
        CodecSpec(128, 3, "key", estimator="prod"),
    ):
        planes = encode_pages(vectors(128), spec, ChannelTransform())
        held = sum(plane.untyped_storage().nbytes() for plane in planes.values())
        assert 8 * held == spec.bits_per_value * vectors(128).numel()


@pytest.mark.parametrize("scale", ["norm", "norm_corrected", "unbiased"])
@pytest.mark.parametrize("estimator", ["mse", "prod"])
@pytest.mark.parametrize("role", ["key", "value"])
def test_a_zero_vector_comes_back_as_zero(role: str, estimator: str, scale: str) -> None:
    spec = CodecSpec(64, 3, role, scale=scale, estimator=estimator)
    x = vectors(64)
    x[:, :, ::3] = 0
    decoded = decode_pages(encode_pages(x, spec, ChannelTransform()), spec, ChannelTransform(), torch.float32)
    assert not decoded[:, :, ::3].any()
    assert decoded[:, :, 1::3].any(-1).all()


@pytest.mark.parametrize("exponent", [-140, -120, -60, 60, 110])
@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_length_does_not_matter_while_the_scale_holds_it(exponent: int, estimator: str) -> None:
    spec = CodecSpec(64, 4, "key", scale_dtype="float32", estimator=estimator)
    x = torch.randn(1, 1, PAGE_TOKENS, 64).mul(64).round() * 2.0**exponent  # exact, subnormal or not
    decoded = decode_pages(encode_pages(x, spec, ChannelTransform()), spec, ChannelTransform(), torch.float64)
    relative = (decoded - x.double()).norm(dim=-1) / x.double().norm(dim=-1)
    assert relative.mean() < (0.11 if estimator == "mse" else 0.26)
    assert relative.max() < 0.7


def test_a_vector_shorter_than_the_scale_can_say_becomes_zero() -> None:
    spec = CodecSpec(64, 4, "key", scale_dtype="float16")  # the smallest positive scale is 2**-24
    x = torch.randn(1, 1, PAGE_TOKENS, 64) * 1e-12
    planes = encode_pages(x, spec, ChannelTransform())
    assert not planes["scale0"].any()
    assert not decode_pages(planes, spec, ChannelTransform(), torch.float32).any()


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("bits", [4, 2.5])
def test_lengths_of_any_size_keep_their_precision(bits: float, size: float) -> None:
    """As for lengths around 1, although the second head is far outside float16 and the third one is empty."""
    spec = CodecSpec(64, bits, "value")
    x = torch.randn(1, 3, 2 * PAGE_TOKENS, 64)
    x[:, 1] *= size
    x[:, 2] = 0
    planes = encode_pages(x, spec, ChannelTransform())
    dtype = torch.float16 if size == 1.0 else torch.float32
    assert {plane.dtype for name, plane in planes.items() if name.startswith("scale")} == {dtype}
    decoded = decode_pages(planes, spec, ChannelTransform(), torch.float64)
    errors = (decoded - x.double()).norm(dim=-1)[0, :2] / x.double().norm(dim=-1)[0, :2]
    assert not decoded[:, 2].any()
    assert 0.9 < errors[1].mean() / errors[0].mean() < 1.1


def test_float16_asked_for_refuses_what_it_does_not_hold() -> None:
    x = torch.randn(1, 2, PAGE_TOKENS, 64)
    x[0, 1, 7] *= 1e5 / x[0, 1, 7].norm()
    spec = CodecSpec(64, 8, "key", scale_dtype="float16")
    with pytest.raises(InvalidInputError, match=r'65504; use scale_dtype="float32"') as raised:
        encode_pages(x, spec, ChannelTransform())
    said = re.match(r"a key has a scale of ([\d.e+]+),", str(raised.value))
    assert said is not None and float(said[1]) == pytest.approx(1e5, rel=0.02)  # 8 bits: nearly the length


def test_a_scale_beyond_float32_is_refused() -> None:
    x = torch.randn(1, 1, PAGE_TOKENS, 64).sign() * torch.finfo(torch.float32).max
    with pytest.raises(InvalidInputError, match=r"torch.float32 holds less than 3.4028e"):
        encode_pages(x, CodecSpec(64, 3, "key"), ChannelTransform())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [3, 2.5])
def test_what_is_not_finite_is_refused(bits: float, dtype: torch.dtype, bad: float) -> None:
    spec = CodecSpec(64, bits, "value")
    for channel in (0, 63):
        x = torch.randn(BATCH, HEADS, PAGE_TOKENS, 64).to(dtype)
        x[1, 1, 100, channel] = bad
        with pytest.raises(NonFiniteError):
            encode_pages(x, spec, ChannelTransform())


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1, 1, 128, 32), torch.float32),
        ((1, 1, 127, 64), torch.float32),
        ((1, 128, 64), torch.float32),
        ((1, 1, 128, 64), torch.int32),
    ],
)
def test_what_is_not_pages_is_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInputError, match="64"):
        encode_pages(torch.zeros(shape, dtype=dtype), CodecSpec(64, 4, "key"), ChannelTransform())


def test_encoding_keeps_no_graph_and_leaves_no_inference_tensors() -> None:
    spec = CodecSpec(36, 2, "key", seed=99)  # used nowhere else: what it caches is made here
    with torch.inference_mode():
        planes = encode_pages(torch.randn(1, 1, PAGE_TOKENS, 36), spec, ChannelTransform())
        decode_code_space(planes, spec)
    x = torch.randn(1, 1, PAGE_TOKENS, 36, requires_grad=True)
    planes = encode_pages(x, spec, ChannelTransform())
    assert not any(plane.requires_grad for plane in planes.values())
    q = torch.randn(1, 1, 1, 36, requires_grad=True)
    (q @ decode_code_space(planes, spec).mT).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(
    ("bits", "dim", "form"), covering([1, 2, 3, 4, 8], [8, 64, 128, 1024], ["int8", "lloyd_max"])
)
def test_nearest_level_is_the_binary_search(bits: int, dim: int, form: str) -> None:
    book = codebook(bits, dim, form)
    thresholds = book.threshold_tensor()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    edges = torch.cat((thresholds, thresholds.nextafter(up), thresholds.nextafter(down), book.level_tensor()))
    unit = torch.cat((edges, torch.randn(20000) / dim**0.5, torch.linspace(-1, 1, 20001), torch.zeros(1)))
    codes, levels = nearest_level(book, CPU)(unit.view(1, -1))
    assert torch.equal(codes, book.quantize(unit).view(1, -1))
    assert torch.equal(levels, book.dequantize(codes))


@settings(max_examples=60)
@given(st.integers(1, 4), st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_no_level_is_nearer(bits: int, coordinates: list[float]) -> None:
    book = codebook(bits, 128)
    unit = torch.tensor(coordinates)
    _, levels = nearest_level(book, CPU)(unit)
    best = (unit[:, None].double() - torch.tensor(book.levels).double()).abs().amin(-1)
    assert ((unit.double() - levels.double()).abs() - best).max() < 1e-7
