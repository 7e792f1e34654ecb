"""The standalone codec: round trips of any shape, honest bytes, a validation that notices a broken codec."""

import math

import pytest
import torch

import quantpress.codecs.turboquant as codec_module
import quantpress.kernels.dequantize as decode_module
import quantpress.kernels.dequantize.reference as decode_reference
import quantpress.kernels.score.reference as score_reference
from quantpress.cache import PackedLayer, cache_memory
from quantpress.cache.layer import LayerSettings
from quantpress.codecs.scalar import ScalarPages
from quantpress.codecs.turboquant import TurboQuantCodec
from quantpress.errors import InvalidInputError, NonFiniteError, UnsupportedBitsError, UnsupportedHeadDimError
from quantpress.kernels.dequantize import decode_code_space
from quantpress.quantization.bounds import lloyd_max_distortion, paper_mse_bound
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.qjl import sketch_variance
from quantpress.quantization.running_moments import RunningMoments
from quantpress.quantization.transform import ChannelTransform, key_statistics
from tests.grids import covering

BITS = (1, 2, 3, 4, 8, 2.5, 3.5)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "shape", [(64,), (1, 64), (0, 64), (127, 64), (129, 64), (3, 5, 7, 64), (2, 0, 64)], ids=str
)
@pytest.mark.parametrize("role", ["key", "value"])
def test_any_shape_comes_back(shape: tuple[int, ...], role: str) -> None:
    codec = TurboQuantCodec(64, bits=4, role=role)
    x = torch.randn(shape)
    packed = codec.encode(x)
    decoded = codec.decode(packed)
    assert packed.vectors == math.prod(shape[:-1])
    assert decoded.shape == x.shape and decoded.dtype == torch.float32
    if x.numel():
        limit = 0.13 if packed.vectors > 9 else 0.25  # one may be unlucky
        assert relative_error(decoded, x) < limit


@pytest.mark.parametrize("shape", [(2, 3, 64), (2, 3, 130, 64), (2, 3, 4, 5, 64)], ids=str)
def test_a_transform_is_applied_and_undone(shape: tuple[int, ...]) -> None:
    codec = TurboQuantCodec(64, bits=3)
    x = torch.randn(shape) + 20 * torch.randn(2, 3, *[1] * (len(shape) - 3), 64)
    keys = x.reshape(2, 3, -1, 64)
    transform = key_statistics(keys, torch.rand(2, 3, 64) + 0.1, codec.spec.groups)
    decoded = codec.decode(codec.encode(x, transform))
    assert decoded.shape == x.shape
    assert relative_error(decoded, x) < 0.4 * relative_error(codec.decode(codec.encode(x)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_in_and_out(dtype: torch.dtype) -> None:
    codec = TurboQuantCodec(80, bits=4, role="value")
    x = torch.randn(50, 80).to(dtype)
    decoded = codec.decode(codec.encode(x), dtype)
    assert decoded.dtype == dtype and relative_error(decoded, x) < 0.13


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", [2, 4, 3.5])
def test_inner_products_are_those_of_the_decoded_vectors(bits: float, role: str) -> None:
    codec = TurboQuantCodec(64, bits, role)
    x, q = torch.randn(2, 3, 150, 64), torch.randn(2, 3, 5, 64)
    packed = codec.encode(x)
    assert relative_error(codec.inner_product(q, packed), q @ codec.decode(packed).mT) < 1e-5
    shared = codec.inner_product(q[0, 0], packed)  # leading dimensions broadcast
    assert shared.shape == (2, 3, 5, 150)
    assert relative_error(shared, q[0, 0] @ codec.decode(packed).mT) < 1e-5
    one = codec.encode(x[0, 0, 0])
    assert relative_error(codec.inner_product(q[0, 0], one), q[0, 0] @ codec.decode(one).unsqueeze(-1)) < 1e-5


def test_inner_products_include_the_mean_key() -> None:
    codec = TurboQuantCodec(64, 3)
    x, q = torch.randn(2, 3, 150, 64) + 5 * torch.randn(2, 3, 1, 64), torch.randn(2, 3, 5, 64)
    packed = codec.encode(x, key_statistics(x, torch.rand(2, 3, 64) + 0.1, codec.spec.groups))
    assert relative_error(codec.inner_product(q, packed), q @ codec.decode(packed).mT) < 1e-5
    assert relative_error(codec.inner_product(q, packed), q @ x.mT) < 0.1


@pytest.mark.parametrize("options", [{}, {"bits": 2.5}, {"estimator": "prod"}], ids=str)
@pytest.mark.parametrize(
    ("queries", "vectors"),
    [
        ((5, 64), (300, 64)),
        ((3, 5, 64), (300, 64)),
        ((5, 64), (2, 130, 64)),
        ((2, 5, 64), (2, 130, 64)),
        ((4, 1, 5, 64), (4, 3, 40, 64)),
        ((7, 4, 3, 5, 64), (4, 1, 40, 64)),
        ((5, 64), (3, 0, 64)),
        ((5, 64), (2, 3, 1, 64)),
    ],
    ids=str,
)
def test_inner_products_broadcast_as_matmul_does(
    queries: tuple[int, ...], vectors: tuple[int, ...], options: dict[str, object]
) -> None:
    codec = TurboQuantCodec(64, **{"bits": 3, **options})  # type: ignore[arg-type]
    q, x = torch.randn(queries), torch.randn(vectors)
    packed = codec.encode(x)
    expected = q @ codec.decode(packed).mT
    found = codec.inner_product(q, packed)
    assert found.shape == expected.shape
    assert found.numel() == 0 or relative_error(found, expected) < 1e-5
    with pytest.raises(InvalidInputError, match="broadcast"):
        codec.inner_product(torch.randn(9, 5, 64), codec.encode(torch.randn(8, 40, 64)))


def test_a_transform_may_have_any_vectors_behind_its_heads() -> None:
    codec = TurboQuantCodec(64, 3)
    x = torch.randn(2, 3, 4, 50, 64) + 5 * torch.randn(2, 3, 1, 1, 64)
    packed = codec.encode(x, key_statistics(x.flatten(2, 3), None, codec.spec.groups))
    q = torch.randn(2, 3, 4, 5, 64)
    assert relative_error(codec.inner_product(q, packed), q @ codec.decode(packed).mT) < 1e-5


@pytest.mark.parametrize("options", [{}, {"bits": 3.5}, {"estimator": "prod"}], ids=str)
def test_inner_products_put_no_vector_together(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where vectors came from nor in code space, and in the workspace of one chunk."""
    codec = TurboQuantCodec(64, **options)  # type: ignore[arg-type]
    packed = codec.encode(torch.randn(5000, 64))
    q = torch.randn(3, 64)
    expected = q @ codec.decode(packed).mT

    def refuse(*args: object) -> None:
        raise AssertionError("vectors were decoded")

    for owner in (codec_module, decode_module, decode_reference):
        for name in ("decode_pages", "decode_code_space", "decode_code_space_reference", "_decode_plane"):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(ChannelTransform, "invert", refuse)
    monkeypatch.setattr(score_reference, "WORKSPACE_VALUES", 2 * 128 * 64)
    largest = 0
    read = score_reference.read_pages

    def measured(*args: object) -> torch.Tensor:
        nonlocal largest
        levels = read(*args)  # type: ignore[arg-type]
        largest = max(largest, levels.numel())
        return levels

    monkeypatch.setattr(score_reference, "read_pages", measured)
    assert relative_error(codec.inner_product(q, packed), expected) < 1e-5
    assert 0 < largest <= 4 * 128 * 64
    with pytest.raises(AssertionError):
        codec.decode(packed)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_two_stage_estimate_is_unbiased_with_the_variance_of_theory(bits: int) -> None:
    """Over independent rotations and sketches: the mean is q.x, the spread that of the residual's sketch."""
    dim, draws = 64, 300
    x, q = torch.randn(1, dim), torch.randn(1, dim)
    found, variance = torch.empty(draws, dtype=torch.float64), 0.0
    for seed in range(draws):
        codec = TurboQuantCodec(dim, bits, estimator="prod", seed=seed + 1)
        packed = codec.encode(x)
        found[seed] = codec.inner_product(q, packed).double()
        residual = float(packed.planes["residual"][0, 0, 0, 0])
        variance += sketch_variance(residual, float(q.norm()), 0.0, dim) / draws
    exact, error = float(q @ x.T), math.sqrt(variance / draws)
    assert abs(float(found.mean()) - exact) < 4.5 * error
    assert 0.6 < float(found.var()) / variance < 1.5
    plain = TurboQuantCodec(dim, bits - 1, scale="norm")  # the first stage alone shrinks
    many = torch.randn(200, dim)
    shrunk = plain.inner_product(many, plain.encode(many)).diagonal().sum()
    assert float(shrunk) < 0.98 * float(many.square().sum())


# Channels that stand out


def loud(channels: list[int], shape: tuple[int, ...] = (600, 64)) -> torch.Tensor:
    x = torch.randn(shape)
    x[..., channels] *= 20
    return x


@pytest.mark.parametrize("role", ["key", "value"])
def test_wide_codes_go_to_the_channels_of_most_energy(role: str) -> None:
    """Against mathematics: each group has the distortion of its own width, weighted by its energy."""
    channels = sorted(torch.randperm(64)[:16].tolist())
    codec = TurboQuantCodec(64, 2.25, role)
    wide = codec.spec.groups[0]
    assert wide == ChannelGroup(16, 3)
    x = loud(channels)
    packed = codec.encode(x)
    order = packed.transform.order
    assert order is not None and sorted(order[0, 0, :16].tolist()) == channels
    quiet = [channel for channel in range(64) if channel not in channels]
    distortion = {
        group: sum((codec.decode(packed) - x)[:, part].square().sum() for part in [columns])
        / x[:, columns].square().sum()
        for group, columns in zip(codec.spec.groups, (channels, quiet), strict=True)
    }
    for group, found in distortion.items():
        plain = lloyd_max_distortion(group.bits, group.channels)
        expected = 2 - 2 * math.sqrt(1 - plain) if role == "key" else plain / (1 - plain)
        assert float(found) == pytest.approx(expected, rel=0.15)
    first = codec.encode(x, ChannelTransform())
    assert relative_error(codec.decode(packed), x) < 0.75 * relative_error(codec.decode(first), x)
    assert packed.nbytes == first.nbytes + 2 * 64  # the order is held, and counted


def test_channels_chosen_online_are_those_of_all_vectors() -> None:
    codec = TurboQuantCodec(64, 2.25)
    channels = sorted(torch.randperm(64)[:16].tolist())
    moments = RunningMoments(64)
    for part in loud(channels, (5, 40, 64)):
        moments.update(part)
    transform = moments.transform(codec.spec.groups)
    later = loud(channels)
    packed = codec.encode(later, transform)
    at_once = codec.encode(later)
    assert relative_error(codec.decode(packed), codec.decode(at_once)) < 0.6
    assert relative_error(codec.decode(packed), later) == pytest.approx(
        relative_error(codec.decode(at_once), later), rel=0.1
    )
    assert relative_error(codec.inner_product(later[:5], packed), later[:5] @ codec.decode(packed).T) < 1e-5


# Bytes


@pytest.mark.parametrize("options", [{}, {"estimator": "prod"}, {"scale_dtype": "float32"}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_ratio_is_that_of_the_bytes_held(dim: int, bits: int, options: dict[str, str]) -> None:
    codec = TurboQuantCodec(dim, bits, **options)
    x = torch.randn(1024, dim).bfloat16()
    packed = codec.encode(x)
    held = sum(plane.untyped_storage().nbytes() for plane in packed.planes.values())
    assert held == packed.nbytes
    assert x.nbytes / held == pytest.approx(codec.compression_ratio)
    assert x.nbytes / held == pytest.approx(16 / codec.spec.bits_per_value)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 7.53), (3, 5.12), (4, 3.88), (2.5, 5.82), (3.5, 4.27)])
def test_ratios_of_the_common_widths(bits: float, ratio: float) -> None:
    assert TurboQuantCodec(128, bits).compression_ratio == pytest.approx(ratio, abs=0.01)


def test_codes_are_not_kept_one_per_byte_nor_beside_a_copy() -> None:
    codec = TurboQuantCodec(128, 3)
    packed = codec.encode(torch.randn(128, 128))
    assert {name: plane.nbytes for name, plane in packed.planes.items()} == {"codes0": 6144, "scale0": 256}
    tensors = [value for value in vars(packed).values() if isinstance(value, torch.Tensor)]
    assert not tensors and not packed.transform.tensors()


@pytest.mark.parametrize(("bits", "dtype"), [(3, torch.bfloat16), (2.5, torch.float32)], ids=str)
@pytest.mark.parametrize("tokens", [100, 132, 260, 261, 700])
def test_the_memory_report_is_what_a_packed_layer_weighs(
    tokens: int, bits: float, dtype: torch.dtype
) -> None:
    keys, values = TurboQuantCodec(64, bits), TurboQuantCodec(64, bits, role="value")
    batch, heads = 2, 3
    settings = LayerSettings(
        ScalarPages(keys.spec), ScalarPages(values.spec), sink_tokens=4, recent_tokens=128
    )
    layer = PackedLayer.from_states(
        torch.randn(batch, heads, tokens, 64, dtype=dtype),
        torch.randn(batch, heads, tokens, 64, dtype=dtype),
        settings,
        query_moment=torch.ones(batch, heads, 64),
    )

    class OneLayer:
        layers = (layer,)

    measured = cache_memory(OneLayer())  # type: ignore[arg-type]
    report = keys.memory_report(tokens, layers=1, kv_heads=heads, batch=batch, dtype=dtype)
    assert report.packed_tokens == layer.packed_tokens
    assert report.code_bytes + report.scale_bytes == measured.packed_bytes
    assert report.dense_bytes == measured.dense_bytes
    assert report.metadata_bytes == measured.metadata_bytes
    assert report.total_bytes == measured.total_bytes
    assert report.uncompressed_bytes == measured.uncompressed_bytes
    assert report.ratio == pytest.approx(measured.ratio)


def test_a_long_context_approaches_the_codec_ratio() -> None:
    codec = TurboQuantCodec(128, 3)
    ratios = [codec.memory_report(n, layers=32, kv_heads=8).ratio for n in (132, 1024, 8192, 131072)]
    assert 0.99 < ratios[0] <= 1.0  # nothing packed yet, but one number a channel is known of the queries
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(codec.compression_ratio, rel=0.01)
    assert max(ratios) < codec.compression_ratio


@pytest.mark.parametrize(
    "counts", [{"context": 0}, {"layers": 0}, {"kv_heads": -1}, {"batch": 0}, {"sink_tokens": -1}], ids=str
)
def test_the_memory_report_refuses_counts_out_of_range(counts: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(counts))):
        TurboQuantCodec(64).memory_report(**{"context": 1, "layers": 1, "kv_heads": 1, **counts})


# Validation


@pytest.mark.parametrize(("dim", "bits", "role"), covering([16, 64, 80, 128, 256], BITS, ["key", "value"]))
def test_a_codec_passes_its_own_validation(dim: int, bits: float, role: str, seed: int) -> None:
    report = TurboQuantCodec(dim, bits, role).validate(samples=2048, seed=seed)
    assert report.ok, report
    assert report.shannon < report.optimum <= report.expected * 1.001


def test_few_samples_hide_no_error() -> None:
    """Coordinates beyond the last level of 8 bits are most of the variance; 256 vectors may have none."""
    few, many = (TurboQuantCodec(80, 8).validate(samples, seed=1) for samples in (256, 32768))
    deviations = [report.standard_error * report.samples**0.5 for report in (few, many)]
    assert deviations[0] == pytest.approx(deviations[1], rel=0.4)


@pytest.mark.parametrize("scale", ["norm", "norm_corrected", "unbiased"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_report_states_the_bounds(bits: int, scale: str, seed: int) -> None:
    report = TurboQuantCodec(128, bits, scale=scale, codebook="lloyd_max").validate(samples=2048, seed=seed)
    assert report.ok, report
    assert report.optimum == lloyd_max_distortion(bits, 128)
    assert report.paper_bound == paper_mse_bound(bits)
    assert report.shannon == 4.0**-bits
    assert report.shannon < report.distortion < report.paper_bound
    assert report.expected_bias == pytest.approx(
        {"norm": -1, "norm_corrected": -0.5, "unbiased": 0}[scale] * report.optimum, rel=0.04
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_sketch_passes_validation(dim: int, bits: int, seed: int) -> None:
    report = TurboQuantCodec(dim, bits, estimator="prod").validate(samples=2048, seed=seed)
    assert report.ok, report
    assert report.expected_bias == 0
    assert report.optimum < report.distortion  # the price of no bias


@pytest.mark.parametrize("factor", [math.sqrt(2), math.sqrt(0.5), 1.1, 0.9])
def test_a_stray_factor_is_noticed(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = codec_module.decode_pages
    monkeypatch.setattr(codec_module, "decode_pages", lambda *args: decode(*args) * factor)
    assert not TurboQuantCodec(128, 4).validate(samples=512).ok


def test_vectors_that_are_never_rotated_back_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        codec_module, "decode_pages", lambda planes, spec, *_: decode_code_space(planes, spec)
    )
    for role in ("key", "value"):
        assert not TurboQuantCodec(128, 4, role).validate(samples=512).ok


def test_a_validation_can_be_repeated() -> None:
    codec = TurboQuantCodec(64, 2)
    assert codec.validate(samples=300, seed=7) == codec.validate(samples=300, seed=7)
    assert codec.validate(samples=300, seed=7) != codec.validate(samples=300, seed=8)
    with pytest.raises(InvalidInputError, match="samples"):
        codec.validate(samples=1)


# What it refuses


def test_refusals_name_what_was_wrong() -> None:
    codec = TurboQuantCodec(64)
    packed = codec.encode(torch.randn(3, 64))
    with pytest.raises(InvalidInputError, match="32"):
        codec.encode(torch.randn(3, 32))
    with pytest.raises(InvalidInputError, match="int64"):
        codec.encode(torch.ones(3, 64, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match="Hkv"):
        codec.encode(torch.randn(3, 64), ChannelTransform(mean=torch.zeros(1, 2, 64)))
    with pytest.raises(NonFiniteError):
        codec.encode(torch.full((3, 64), float("nan")))
    with pytest.raises(InvalidInputError, match="another codec"):
        TurboQuantCodec(64, seed=1).decode(packed)
    with pytest.raises(InvalidInputError, match="another codec"):
        TurboQuantCodec(64, role="value").inner_product(torch.randn(1, 64), packed)
    with pytest.raises(InvalidInputError, match="Q"):
        codec.inner_product(torch.randn(64), packed)
    with pytest.raises(UnsupportedBitsError):
        TurboQuantCodec(64, bits=5)
    with pytest.raises(UnsupportedHeadDimError):
        TurboQuantCodec(66)
    with pytest.raises(InvalidInputError, match="role"):
        TurboQuantCodec(64, role="query")
    with pytest.raises(InvalidInputError, match="no argument 'bit'; did you mean 'bits'"):
        TurboQuantCodec(64, bit=3)


# Speed


def test_the_benchmark_measures_what_it_says() -> None:
    report = TurboQuantCodec(64, 3).benchmark(vectors=1000, repeats=1)
    packed = TurboQuantCodec(64, 3).encode(torch.randn(1000, 64))
    assert (report.vectors, report.dense_bytes, report.packed_bytes) == (1000, 128000, packed.nbytes)
    seconds = {name: value for name, value in report.as_dict().items() if name.endswith("_s")}
    assert len(seconds) == 5 and all(value > 0 for value in seconds.values())
    assert report.encode_ratio == report.copy_s / report.encode_s
    with pytest.raises(InvalidInputError, match="vectors"):
        TurboQuantCodec(64).benchmark(vectors=0)
