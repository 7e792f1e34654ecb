"""Trellis codes: paths against brute force, their distortion, their pages, and caches packed in them."""

from itertools import product

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from quantpress.cache import cache_memory
from quantpress.codecs import ScalarPages, TrellisPages, codec_of
from quantpress.errors import InvalidInputError, NonFiniteError, UnsupportedBitsError
from quantpress.kernels.attend import PackedSegment, PackedSide, Visibility, attend
from quantpress.kernels.layout import page_bytes, unpack_pages
from quantpress.kernels.trellis.bit_planes import pack_bit_planes, unpack_bit_planes
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.presses import TurboQuant
from quantpress.presses.expression import parse_press
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from quantpress.quantization.trellis import nearest_path, trellis
from quantpress.quantization.trellis.levels import beginning, build, fitted
from quantpress.quantization.trellis.path import searched
from tests.pipelines.words import ours, text
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

NONE = ChannelTransform()
WIDTHS = (1, 2, 3, 4)


def unit_vectors(count: int, dim: int, seed: int | None = None) -> torch.Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def levels_by_hand(codes: list[int], bits: int) -> list[float]:
    """The level of each channel: 8 or 9 bits of the codes up to it, which go around the vector."""
    stream, window = "".join(f"{code:0{bits}b}" for code in codes), 9 if bits == 3 else 8
    around, code = stream[-window:] + stream, trellis(bits)
    ends = range(window + bits, len(around) + 1, bits)
    return [code.levels[int(around[end - window : end], 2)] / len(codes) ** 0.5 for end in ends]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_level_is_chosen_by_the_last_bits(bits: int) -> None:
    codes = torch.randint(1 << bits, (3, 16), dtype=torch.uint8)
    expected = torch.tensor([levels_by_hand(row, bits) for row in codes.tolist()])
    torch.testing.assert_close(trellis(bits).dequantize(codes), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_are_decoded_by_filters_of_their_bits(bits: int) -> None:
    codes, filters = torch.randint(1 << bits, (3, 16), dtype=torch.uint8), trellis(bits).filters
    assert [len(taps) for taps in filters] == bits * [-(-8 // bits)]
    x = torch.zeros(3, 16)
    for k, taps in enumerate(filters):
        signs = 2.0 * (codes >> k & 1) - 1
        for lag, tap in enumerate(taps):
            x += tap * signs[:, [(t - lag) % 16 for t in range(16)]]
    torch.testing.assert_close(x / 4, trellis(bits).dequantize(codes))


def test_levels_of_one_bit_are_free() -> None:
    assert trellis(1).taps is None and trellis(1).filters == ()


def best_of_all_ends(unit: torch.Tensor, bits: int) -> torch.Tensor:
    """[N] least squared error of paths that are searched from each state back to it."""
    levels = trellis(bits).level_tensor(unit.shape[-1])
    ends = torch.arange(len(levels), device="cpu").repeat_interleave(len(unit))
    x = unit.T.repeat(1, len(levels))  # every vector for every state
    errors = (levels[searched(x, levels, bits, ends).long()] - x).square().sum(0)
    return errors.view(len(levels), -1).amin(0)


@pytest.mark.parametrize(("bits", "dim"), [(1, 12), (2, 6)])
def test_the_nearest_path_of_a_beginning_is_found(bits: int, dim: int) -> None:
    unit, code = unit_vectors(20, dim), trellis(bits)
    every = torch.tensor(list(product(range(1 << bits), repeat=dim)), dtype=torch.uint8)
    nearest = (code.dequantize(every)[:, None] - unit).square().sum(-1).amin(0)
    torch.testing.assert_close(best_of_all_ends(unit, bits), nearest, rtol=1e-4, atol=1e-6)


def test_one_beginning_is_nearly_as_good_as_all() -> None:
    unit, bits, code = unit_vectors(20, 48, seed=2), 2, trellis(2)
    found = (code.dequantize(nearest_path(unit, code)) - unit).square().sum(-1)
    best = best_of_all_ends(unit, bits)
    assert (found >= best - 1e-6).all() and found.mean() < 1.02 * best.mean()


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_other_code_in_the_middle_is_nearer(bits: int) -> None:
    """Paths with the same last codes, and so the same ends, are searched exactly."""
    unit, code = unit_vectors(64, 32), trellis(bits)
    codes = nearest_path(unit, code)
    error = (code.dequantize(codes) - unit).square().sum(-1)
    for at in range(32 - code.reach):
        for other in range(1 << bits):
            changed = codes.clone()
            changed[:, at] = other
            assert ((code.dequantize(changed) - unit).square().sum(-1) >= error - 1e-6).all()


@pytest.mark.parametrize(
    ("bits", "at_64", "at_128"),
    [(1, 0.2858, 0.2812), (2, 0.0782, 0.0791), (3, 0.0206, 0.0208), (4, 0.0057, 0.0059)],
)
def test_distortion(bits: int, at_64: float, at_128: float) -> None:
    """Scalar codes have .361, .116, .034 and .0093; the limits are .25, .0625, .0156 and .0039."""
    code = trellis(bits)
    for dim, measured in ((64, at_64), (128, at_128)):
        unit = unit_vectors(2**16 // dim, dim, seed=1)
        error = float((code.dequantize(nearest_path(unit, code)) - unit).square().sum(-1).mean())
        assert error == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("bits", WIDTHS)
def test_lloyds_iteration_hardly_improves_what_is_shipped(bits: int) -> None:
    improved, before = fitted(trellis(bits), 1, 512, seed=3)
    assert fitted(improved, 1, 512, seed=3)[1] > 0.97 * before


@pytest.mark.parametrize("bits", [1, 2])
def test_levels_are_found_from_beginnings(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantpress.quantization.trellis.levels.STAGES", ((3, 2, 128), (1, 3, 256)))
    random = [fitted(beginning(bits, seed), 1, 256, seed=9)[1] for seed in range(3)]
    made = build(bits)
    assert fitted(made, 1, 256, seed=9)[1] < 0.97 * min(random)
    assert (made.taps is None) == (bits == 1)


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_pages_are_those_of_scalar_codes_in_size_and_decode_to_levels(bits: int, role: str) -> None:
    x = torch.randn(2, 3, 256, 32)
    codec, scalar = TrellisPages(32, bits, role), ScalarPages(CodecSpec(32, bits, role))
    planes, others = codec.encode(x, NONE), scalar.encode(x, NONE)
    assert {name: (plane.shape, plane.dtype) for name, plane in planes.items()} == {
        name: (plane.shape, plane.dtype) for name, plane in others.items()
    }
    assert codec.bits_per_value == scalar.bits_per_value
    codes = unpack_bit_planes(planes["codes0"], bits, 32, role)
    by_hand = torch.tensor([levels_by_hand(row, bits) for row in codes[0, 1, 1].tolist()])
    expected = by_hand * planes["scale0"][0, 1, 1].float()[:, None]
    torch.testing.assert_close(codec.decode_code_space(planes)[0, 1, 128:], expected)
    trellis_error, scalar_error = (
        (one.decode(some, NONE, torch.float32) - x).square().mean()
        for one, some in ((codec, planes), (scalar, others))
    )
    assert trellis_error < (0.95 if bits == 1 else 0.8) * scalar_error


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_bits_of_codes_lie_in_pages_of_one_bit(bits: int, role: str) -> None:
    codes = torch.randint(1 << bits, (2, 3, 128, 24), dtype=torch.uint8)
    packed = pack_bit_planes(codes, bits, role)
    for k, page in enumerate(packed.split(page_bytes(1, 24), dim=-1)):
        assert torch.equal(unpack_pages(page, 1, 24, role), codes >> k & 1)
    assert torch.equal(unpack_bit_planes(packed, bits, 24, role), codes)


@pytest.mark.parametrize("role", ["key", "value"])
def test_scales_keep_what_their_rule_says(role: str) -> None:
    x = 3 * torch.randn(1, 2, 128, 64)
    codec = TrellisPages(64, 2, role, scale_dtype="float32")
    decoded = codec.decode(codec.encode(x, NONE), NONE, torch.float32)
    if role == "key":
        torch.testing.assert_close(decoded.norm(dim=-1), x.norm(dim=-1), rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close((decoded * x).sum(-1), x.square().sum(-1), rtol=1e-4, atol=1e-4)


def test_vectors_of_every_size() -> None:
    codec = TrellisPages(16, 2, "key")
    x = torch.randn(1, 2, 128, 16)
    x[0, 0, 5] = 0
    planes = codec.encode(x, NONE)
    assert not codec.decode(planes, NONE, torch.float32)[0, 0, 5].any()
    large = codec.encode(x * 1e6, NONE)
    assert (planes["scale0"].dtype, large["scale0"].dtype) == (torch.float16, torch.float32)
    assert torch.equal(large["codes0"], codec.encode(x * 2.0**20, NONE)["codes0"])
    with pytest.raises(NonFiniteError):
        codec.encode(x.index_fill(2, torch.tensor([3]), torch.nan), NONE)
    with pytest.raises(InvalidInputError, match="T a multiple of 128"):
        codec.encode(x[:, :, :100], NONE)
    empty = codec.encode(x[:, :, :0], NONE)
    assert codec.decode(empty, NONE, torch.float32).shape == (1, 2, 0, 16)


def test_a_little_at_a_time_and_under_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = TrellisPages(16, 3, "key"), torch.randn(2, 3, 384, 16, requires_grad=True)
    transform = ChannelTransform(x.mean(2), x.square().mean(2))
    whole = codec.encode(x, transform)
    monkeypatch.setattr("quantpress.codecs.trellis.WORKSPACE_VALUES", 3 * 2 * 128 * 16)
    parts = codec.encode(x, transform)
    assert not parts["scale0"].requires_grad
    assert (parts["codes0"] == whole["codes0"]).float().mean() > 0.999  # products of matrices may round
    torch.testing.assert_close(parts["scale0"], whole["scale0"], rtol=2**-9, atol=0)


def test_attention_is_that_of_the_decoded_values() -> None:
    sides = []
    for role in ("key", "value"):
        codec = TrellisPages(32, 3, role)
        parts = torch.randn(2, 2, 32), torch.rand(2, 2, 32) + 0.5
        transform = ChannelTransform(*parts) if role == "key" else NONE
        sides.append(PackedSide(codec, codec.encode(torch.randn(2, 2, 256, 32), transform), transform))
    query = torch.randn(2, 4, 1, 32)
    found = attend(query, [PackedSegment(*sides)], Visibility(1, 256), scaling=0.3)
    decoded = [one.codec.decode(one.planes, one.transform, torch.float32) for one in sides]
    expected = scaled_dot_product_attention(query, *decoded, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_moved_with_their_codes() -> None:
    codec, x = TrellisPages(16, 2, "value"), torch.randn(1, 2, 256, 16)
    planes = codec.encode(x, NONE)
    tokens = torch.stack([torch.randperm(256)[:128] for _ in range(2)])[None]
    decoded = codec.decode(planes, NONE, torch.float32)
    moved = codec.decode(codec.gather(planes, tokens), NONE, torch.float32)
    torch.testing.assert_close(moved, decoded.take_along_dim(tokens[..., None], 2), rtol=1e-5, atol=1e-6)


def test_a_codec_of_other_constants_is_refused() -> None:
    codec = TrellisPages(32, 2, "key", seed=5)
    parts = codec.parts()
    assert codec_of(parts) == codec
    parts.about["seed"] = 6
    with pytest.raises(InvalidInputError, match="not those that the pages were packed with"):
        codec_of(parts)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 2.5}, UnsupportedBitsError, "trellis codes of 1, 2, 3 and 4 bits, not of 2.5"),
        ({"bits": 2, "estimator": "prod"}, InvalidInputError, "estimator='prod' is for scalar codes"),
        ({"bits": 2, "codebook": "lattice"}, InvalidInputError, "use one of int8, lloyd_max, trellis"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TurboQuant(**{"codebook": "trellis", **options})


def test_a_press_packs_in_trellis_codes_and_a_context_keeps_them(tmp_path) -> None:
    press = parse_press("TurboQuant(key_bits=3, value_bits=2, codebook='trellis', recent_tokens=16)")
    assert press.bits_per_value(64) == 2.5 + 16 / 64
    pipe, file = ours(), tmp_path / "context.safetensors"
    context = pipe.read(text(400), press=press)
    context.save(file)
    loaded = CachedContext.load(file, pipe.model, press=press)
    for layer, other in zip(context.cache.layers, loaded.cache.layers, strict=True):
        assert isinstance(layer.settings.key_codec, TrellisPages) and layer.packed_tokens
        assert layer.settings == other.settings and layer.settings.value_codec.bits == 2
        assert torch.equal(layer.keys.clone(), other.keys.clone())
    answers = [pipe(one, question="w1 w2", max_new_tokens=8)["answer"] for one in (context, loaded)]
    assert answers[0] == answers[1]


def test_the_same_bytes_as_scalar_codes_and_8_bits_stay_scalar() -> None:
    model = tiny_model("llama")
    presses = [TurboQuant(key_bits=8, value_bits=2, codebook=form) for form in ("trellis", "int8")]
    caches = [read(model, press, prompt(700)) for press in presses]
    first, second = (cache_memory(cache) for cache in caches)
    assert first.total_bytes == second.total_bytes
    settings = caches[0].layers[0].settings
    assert isinstance(settings.key_codec, ScalarPages) and isinstance(settings.value_codec, TrellisPages)
    assert settings.key_codec == caches[1].layers[0].settings.key_codec
