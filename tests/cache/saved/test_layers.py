"""Caches taken apart and put together again: the same numbers now, and the same whatever comes later."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from quantpress.cache import LayerSettings, PackedLayer, cache_memory, host
from quantpress.cache.fixed.layers import FixedPackedLayer
from quantpress.cache.fixed.step_counters import StepCounters
from quantpress.cache.ranks import Ranks
from quantpress.cache.saved.format import read_file
from quantpress.cache.saved.head_parts import own_heads
from quantpress.cache.saved.layers import cache_of, cache_parts
from quantpress.codecs.block_hadamard import BlockHadamardPages
from quantpress.codecs.fp8 import Fp8Pages
from quantpress.codecs.parts import Parts, rebuild
from quantpress.codecs.protocol import codec_of
from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages, constants_digest
from quantpress.codecs.uniform import UniformPages
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import Visibility, attend
from quantpress.quantization.spec import CodecSpec
from tests.cache.caches import grouped, lossless, scalar

D, HEADS = 32, 2
FORMAT_1 = Path(__file__).parent / "data" / "format_1.safetensors"


def states(
    tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, batch, HEADS, tokens, D).to(dtype)
    return keys, values


def mixed() -> LayerSettings:
    spec = CodecSpec(D, 3, "key", estimator="prod", seed=5, rotation="haar", scale_dtype="float32")
    return LayerSettings(ScalarPages(spec), ScalarPages(CodecSpec(D, 2.5, "value")), 7, 30, balance=False)


SETTINGS: dict[str, Callable[[], LayerSettings]] = {
    "lossless": lossless,
    **{f"{bits}_bits": (lambda bits=bits: scalar(D, bits)) for bits in (1, 2, 3, 4, 8, 2.5)},
    "by_head": grouped,
    "mixed": mixed,
    "uniform": lambda: LayerSettings(UniformPages(D, 4, "channel"), UniformPages(D, 4)),
    "hadamard_fp8": lambda: LayerSettings(BlockHadamardPages(D, 4, block=8), Fp8Pages(D)),
}


def packed(settings: LayerSettings, tokens: int, **options: Any) -> PackedLayer:
    return PackedLayer.from_states(*states(tokens, **options), settings, tokens_seen=tokens + 9)


def again(cache: DynamicCache) -> DynamicCache:
    """The cache taken apart, sent through JSON and rebuilt, over copies of the tensors."""
    parts = cache_parts(cache)
    outline = json.loads(json.dumps(parts.outline()))
    tensors = {name: tensor.clone() for name, tensor in parts.flat().items()}
    return cache_of(Parts.from_outline(outline, tensors))


def cache_with(*layers: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = list(layers)
    return cache


def same(left: Any, right: Any) -> bool:
    """Whether two layers hold the same tokens, bit for bit."""
    pairs = ((left.keys, right.keys), (left.values, right.values))
    return (
        all(a.dtype == b.dtype and torch.equal(a.clone() + 0, b.clone() + 0) for a, b in pairs)
        and left.get_seq_length() == right.get_seq_length()
    )


@pytest.mark.parametrize("tokens", [1, 5, 131, 132, 260, 700])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_packed_layer_goes_on_as_if_nothing_had_happened(settings: str, tokens: int) -> None:
    layer = packed(SETTINGS[settings](), tokens)
    other = again(cache_with(layer)).layers[0]
    assert same(layer, other)
    assert other.settings == layer.settings and other.tokens_seen == tokens + 9
    assert other.packed_tokens == layer.packed_tokens
    for new in (1, 300, 3):
        more = states(new)
        for left, right in zip(layer.update(*more), other.update(*more), strict=True):
            assert torch.equal(left.clone() + 0, right.clone() + 0)
    for one in (layer, other):
        one.crop(tokens // 2)
    assert same(layer, other) and layer.tokens_seen == other.tokens_seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_batches_and_dtypes(dtype: torch.dtype) -> None:
    layer = packed(scalar(D, 3), 400, batch=3, dtype=dtype)
    other = again(cache_with(layer)).layers[0]
    assert same(layer, other) and other.dtype == dtype
    for one in (layer, other):
        one.batch_select_indices(torch.tensor([2, 0]))
    assert same(layer, other)


def evicted(settings: LayerSettings, tokens: int = 700, batch: int = 2) -> PackedLayer:
    """Heads that keep different numbers of tokens."""
    hidden = torch.rand(batch, HEADS, tokens) < torch.rand(batch, HEADS, 1)
    hidden[..., -4:] = False
    return PackedLayer.from_states(*states(tokens, batch), settings, hidden=hidden)


@pytest.mark.parametrize("settings", [name for name in SETTINGS if name != "by_head"])
def test_heads_that_keep_different_tokens_go_on_too(settings: str) -> None:
    layer = evicted(SETTINGS[settings]())
    cache = cache_with(layer)
    other = again(cache).layers[0]
    assert cache_memory(cache).layers == cache_memory(cache_with(other)).layers
    for new in (1, 300, 3):
        more = states(new, 2)
        queries = torch.randn(2, HEADS, new, D)
        outputs = []
        for one in (layer, other):
            one.update(*more)
            segments = one.view().segments()
            limits = Visibility(new, sum(segment.tokens for segment in segments))
            outputs.append(attend(queries, segments, limits, scaling=0.2))
        assert torch.equal(*outputs)
    for one in (layer, other):
        one.batch_select_indices(torch.tensor([1, 1, 0]))
        one.crop(one.get_seq_length() - 2)
    assert layer.get_seq_length() == other.get_seq_length()
    again(cache_with(layer))


def test_the_queries_that_the_first_page_waits_for_are_kept() -> None:
    keys, values = states(100)
    layer = PackedLayer.from_states(keys, values, scalar(D), query_moment=torch.rand(1, HEADS, D) + 0.1)
    other = again(cache_with(layer)).layers[0]
    more = states(200)
    for one in (layer, other):
        one.update(*more)
    assert layer.packed_tokens and layer.tokens is not None and layer.tokens.key_transform is not None
    assert layer.tokens.key_transform.weight is not None
    assert same(layer, other)


def test_every_field_of_packed_tokens_is_saved() -> None:
    """A new field must be saved too: add it to `quantpress.cache.saved.layers`, then here."""
    known = {
        "settings",
        "dtype",
        "sinks",
        "_recent",
        "pages",
        "heads",
        "demoted",
        "key_transform",
        "value_transform",
        "query_moment",
    }
    layer = packed(scalar(D), 300)
    assert set(vars(layer.tokens)) == known
    other = again(cache_with(layer)).layers[0]
    assert set(vars(other)) == set(vars(layer))
    assert set(vars(other.tokens)) == known


def test_tokens_at_fixed_addresses_are_saved_as_they_are_now() -> None:
    layer = packed(scalar(D), 300)
    counters = StepCounters(1, (1, HEADS), torch.device("cpu"))
    FixedPackedLayer(layer, counters, 0).enter(None)
    parts = cache_parts(cache_with(layer))
    assert layer.fixed is not None  # saving takes nothing away
    assert same(layer, cache_of(parts).layers[0])


def test_plain_sliding_and_empty_layers() -> None:
    plain, empty, unused = DynamicLayer(), DynamicLayer(), PackedLayer(scalar(D))
    plain.update(*states(20))
    sliding = DynamicSlidingWindowLayer(16)
    sliding.update(*states(40))
    cache = again(cache_with(plain, sliding, empty, unused))
    assert [type(layer) for layer in cache.layers] == [
        DynamicLayer,
        DynamicSlidingWindowLayer,
        DynamicLayer,
        PackedLayer,
    ]
    assert same(plain, cache.layers[0]) and same(sliding, cache.layers[1])
    assert cache.layers[1].get_mask_sizes(host.mask_query(3)) == sliding.get_mask_sizes(host.mask_query(3))
    more = states(3)
    for left, right in ((plain, cache.layers[0]), (sliding, cache.layers[1])):
        for a, b in zip(left.update(*more), right.update(*more), strict=True):
            assert torch.equal(a, b)
    for layer in cache.layers[2:]:
        assert layer.get_seq_length() == 0
        layer.update(*more)
        assert layer.get_seq_length() == 3


def test_other_layers_and_codecs_are_refused() -> None:
    static = StaticLayer(32)
    static.update(*states(4), {"cache_position": torch.arange(4)})
    with pytest.raises(InvalidInputError, match=r"layer 1 .* StaticLayer"):
        cache_parts(cache_with(DynamicLayer(), static))

    class Own(RawPages):
        """Its pages may be anything: another process does not know it."""

    assert codec_of(RawPages(8).parts()) == RawPages(8)
    with pytest.raises(InvalidInputError, match="Own cannot be saved"):
        cache_parts(cache_with(PackedLayer(LayerSettings(Own(D), RawPages(D)))))


# What does not fit


def test_widths_by_head_are_not_divided_among_processes() -> None:
    parts = cache_parts(cache_with(packed(grouped(), 300)))
    with pytest.raises(InvalidInputError, match="widths of their own, which cannot be divided among"):
        own_heads(parts, Ranks(2, 0, None, split_heads=True))


def test_another_seed_behind_the_same_digest_is_refused() -> None:
    parts = ScalarPages(CodecSpec(D, 3, "key", seed=1)).parts()
    assert codec_of(parts).spec.seed == 1  # type: ignore[attr-defined]
    forged = Parts(parts.kind, {**parts.about, "seed": 2})
    with pytest.raises(InvalidInputError, match="rotation"):
        codec_of(forged)


def test_codes_of_8_bits_are_read_with_the_levels_they_were_packed_with() -> None:
    """Their digest as it was before these levels were evenly spaced."""
    spec = CodecSpec(D, 8, "key")
    once = "16330e68cac0fcd7116347bd8e67d4f20519aec228a5b8acbc82f97fc75ea9d8"
    keys = ScalarPages(replace(spec, codebook="lloyd_max"))
    settings = LayerSettings(keys, ScalarPages(CodecSpec(D, 8, "value")), 4, 20)
    layer = packed(settings, 300)
    parts = cache_parts(cache_with(layer))
    codec = parts.inner["0"].inner["key_codec"]
    codec.about.update(codebook="int8", constants=once)
    (found,) = cache_of(parts).layers
    assert isinstance(found, PackedLayer) and found.settings == settings and same(found, layer)
    assert codec_of(ScalarPages(spec).parts()) == ScalarPages(spec)
    codec.about["constants"] = once[::-1]
    with pytest.raises(InvalidInputError, match="pack the context again"):
        cache_of(parts)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"rotation": "haar"}, {"bits": 2}, {"codebook": "lloyd_max"}, {"role": "value"}],
    ids=str,
)
def test_the_digest_tells_codecs_apart(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {"head_dim": D, "bits": 3, "role": "key"}
    assert constants_digest(CodecSpec(**fields)) == constants_digest(CodecSpec(**fields))
    assert constants_digest(CodecSpec(**fields)) != constants_digest(CodecSpec(**{**fields, **change}))


def _damage(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], None]:
    def damage(parts: Parts) -> None:
        *path, last = name.split("/")
        for step in path:
            parts = parts.inner[step]
        parts.tensors[last] = change(parts.tensors[last])

    return damage


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sink_keys", lambda t: t[:, :1]),
        ("sink_values", lambda t: t[:, :, :2]),
        ("recent_keys", lambda t: t.half()),
        ("recent_values", lambda t: t[..., :-4]),
        ("recent_keys", lambda t: t[0]),
        ("pages/keys/codes0", lambda t: t[..., :-1]),
        ("pages/keys/codes0", lambda t: t.to(torch.int16)),
        ("pages/keys/scale0", lambda t: t[:, :, :1]),
        ("pages/values/scale1", lambda t: t[:, :1]),
        ("value_transform/order", lambda t: torch.zeros_like(t)),
        ("value_transform/order", lambda t: t + 1000),
        ("key_transform/mean", lambda t: t[:, :, :-1]),
        ("key_transform/mean", lambda t: t.double()),
    ],
)
def test_parts_that_do_not_fit_are_refused(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    settings = LayerSettings(ScalarPages(CodecSpec(D, 3, "key")), ScalarPages(CodecSpec(D, 2.5, "value")))
    parts = cache_parts(cache_with(packed(settings, 500)))
    cache_of(parts)
    tokens = parts.inner["0"].inner["tokens"]
    _damage(name, change)(tokens)
    with pytest.raises(InvalidInputError):
        cache_of(parts)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pages/table", lambda t: t + 1000),
        ("pages/table", lambda t: t - 1),
        ("pages/table", lambda t: t.long()),
        ("pages/table", lambda t: t[:, :1]),
        ("pages/keys/codes0", lambda t: t[:, :, :-1]),
        ("heads/sinks", lambda t: t + 9),
        ("heads/absent", lambda t: t - 999),
        ("heads/absent", lambda t: t[:1]),
    ],
)
def test_tables_and_counts_that_do_not_fit_are_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    parts = cache_parts(cache_with(evicted(scalar(D, 3))))
    _damage(name, change)(parts.inner["0"].inner["tokens"])
    with pytest.raises(InvalidInputError):
        cache_of(parts)


@pytest.mark.parametrize("gone", ["pages", "key_transform", "value_transform"])
def test_parts_that_are_missing_are_noticed(gone: str) -> None:
    parts = cache_parts(cache_with(packed(scalar(D, 3), 500)))
    del parts.inner["0"].inner["tokens"].inner[gone]
    with pytest.raises((InvalidInputError, KeyError)):
        cache_of(parts)


def test_unknown_kinds_and_outlines_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="no_such_kind"):
        rebuild(Parts("no_such_kind"))
    with pytest.raises(InvalidInputError, match="pages"):
        rebuild(Parts("pages"), "raw_codec")
    with pytest.raises(InvalidInputError, match="not those of a codec"):
        codec_of(Parts("pages"))
    for outline in (None, [], {}, {"kind": "a", "about": 1, "tensors": [], "inner": {}}):
        with pytest.raises(InvalidInputError):
            Parts.from_outline(outline, {})
    missing = {"kind": "a", "about": {}, "tensors": ["x"], "inner": {}}
    with pytest.raises(InvalidInputError, match="x"):
        Parts.from_outline(missing, {})


# A file of format 1, as it was written when the format was made


def waves(dim: int) -> torch.Tensor:
    """[1, 1, 300, dim], without randomness."""
    token = torch.arange(300, dtype=torch.float64).unsqueeze(1)
    channel = torch.arange(dim, dtype=torch.float64)
    return (torch.sin(token * 0.37 + channel * 1.3) + 0.2 * channel).float()[None, None]


@pytest.mark.parametrize("bits", [3, 2.5])
def test_a_file_of_format_1_is_still_read_right(bits: float) -> None:
    """With another page layout, rotation or codebook these would decode to noise; increase FORMAT then."""
    about, tensors = read_file(FORMAT_1.with_stem(f"format_1_{bits}_bits"))
    layer = cache_of(Parts.from_outline(about["cache"], tensors)).layers[0]
    assert layer.packed_tokens == 256
    for found, dim in ((layer.keys, 16), (layer.values, 8)):
        error = (found.clone() - waves(dim)).square().sum() / (waves(dim) - waves(dim).mean(2)).square().sum()
        assert float(error) < {3: 0.06, 2.5: 0.12}[bits]
