"""`TurboQuant`: its settings, what it packs, and what it refuses."""

import copy
import gc
import weakref
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress.cache import PackedLayer, cache_memory
from quantpress.codecs.raw import RawPages
from quantpress.errors import InvalidInputError, UnsupportedBitsError
from quantpress.presses import Compose, Knorm, Merging, SnapKV, StreamingLLM, ThinK, TurboQuant
from quantpress.quantization.spec import CodecSpec
from tests.presses.reading import answer, lossless, read
from tests.tiny_models import HEAD_DIM, prompt, tiny_model

IDS = prompt(420)


def packed_layers(cache: DynamicCache) -> list[PackedLayer]:
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers)
    return list(cache.layers)


def spec_of(layer: Any, role: str) -> CodecSpec:
    codec = layer.settings.key_codec if role == "key" else layer.settings.value_codec
    return codec.spec


def raw_pages(head_dim: int, role: str, layer_idx: int) -> RawPages:
    return RawPages(head_dim, 32)


# --- settings ---


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 5}, UnsupportedBitsError, "bits=5"),
        ({"bits": 16}, UnsupportedBitsError, "bits=16"),
        ({"key_bits": 0}, UnsupportedBitsError, "bits=0"),
        ({"value_bits": 4.5}, UnsupportedBitsError, "bits=4.5"),
        ({"bits": "4"}, UnsupportedBitsError, "bits='4'"),
        ({"bits": [4, 3]}, UnsupportedBitsError, r"bits=\[4, 3\] is not a code width"),
        (
            {"compression_ratio": 0.5},
            InvalidInputError,
            r"evicts nothing; .* bits=, .* SnapKV\(",
        ),
        ({"bit": 4}, InvalidInputError, "TurboQuant has no argument 'bit'; did you mean 'bits'"),
        ({"sink_tokens": True}, InvalidInputError, "sink_tokens is True"),
        ({"mean_key": "no"}, InvalidInputError, "mean_key is 'no'; give True or False"),
        ({"layer_bits": [4, 3]}, InvalidInputError, r"layer_bits is \[4, 3\]; give a dict"),
        ({"codec": "raw"}, InvalidInputError, "codec is 'raw'; give a function"),
        ({"layer_bits": {0: 7}}, UnsupportedBitsError, "bits=7"),
        ({"boundary_layers": 1, "boundary_bits": 7}, UnsupportedBitsError, "bits=7"),
        ({"boundary_layers": -1}, InvalidInputError, "boundary_layers is -1"),
        ({"layer_bits": {0: (4, 16)}}, UnsupportedBitsError, "bits=16"),
        ({"layer_bits": {"first": 4}}, InvalidInputError, "layer 'first'"),
        ({"bits": 2.5, "estimator": "prod"}, UnsupportedBitsError, "prod"),
        ({"sink_tokens": -1}, InvalidInputError, "sink_tokens is -1"),
        ({"recent_tokens": 1.5}, InvalidInputError, "recent_tokens is 1.5"),
        ({"balance_window": 0}, InvalidInputError, "balance_window is 0"),
        ({"rotation": "dct"}, InvalidInputError, "rotation='dct'"),
        ({"scale": "max"}, InvalidInputError, "scale='max'"),
        ({"codebook": "nf4"}, InvalidInputError, "codebook is 'nf4'; use one of int8, lloyd_max, trellis"),
        ({"estimator": "qjl"}, InvalidInputError, "estimator='qjl'"),
        ({"seed": -3}, InvalidInputError, "seed"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TurboQuant(**options)


def test_presets() -> None:
    quality, balanced, small, paper = map(TurboQuant.preset, ("quality", "balanced", "small", "paper"))
    assert (quality.key_bits, quality.value_bits) == (8, 4)
    assert balanced == TurboQuant(4, detect_sinks=8, recent_tokens=64)
    assert small == TurboQuant.preset("balanced", bits=3) and TurboQuant(4) == TurboQuant()
    assert (quality.detect_sinks, paper.detect_sinks, paper.recent_tokens) == (8, 0, 128)
    assert (paper.mean_key, paper.balance, paper.scale, paper.codebook) == (False, False, "norm", "lloyd_max")
    assert TurboQuant.preset("paper", bits=2, seed=5).bits == 2
    with pytest.raises(
        InvalidInputError, match="no preset 'best'; use one of balanced, paper, quality, small"
    ):
        TurboQuant.preset("best")


def test_true_bits_are_told() -> None:
    assert TurboQuant(4).bits_per_value(128) == 4 + 16 / 128
    assert TurboQuant(key_bits=4, value_bits=2).bits_per_value(64) == 3 + 16 / 64
    assert TurboQuant(key_bits=3, value_bits=3, estimator="prod").bits_per_value(128) == 3 + 24 / 128
    assert lossless().bits_per_value(64) == 32


def test_it_evicts_nothing() -> None:
    press = TurboQuant()
    assert press.compression_ratio == 0
    with pytest.raises(AttributeError, match="evicts nothing"):
        press.compression_ratio = 0.5


# --- what is packed, and how ---


def test_widths_of_keys_values_and_layers() -> None:
    press = TurboQuant(3, value_bits=2, layer_bits={0: 16, -1: (8, 4)}, recent_tokens=16)
    first, middle, last = read(tiny_model("llama"), press, IDS).layers
    assert not isinstance(first, PackedLayer)
    assert (spec_of(middle, "key").bits, spec_of(middle, "value").bits) == (3, 2)
    assert (spec_of(last, "key").bits, spec_of(last, "value").bits) == (8, 4)


@pytest.mark.parametrize(
    ("bits", "own", "expected"),
    [
        (16, {}, [None, (3, 3), None]),
        (8, {}, [(8, 8), (3, 3), (8, 8)]),
        ((8, 4), {-1: 2}, [(8, 4), (3, 3), (2, 2)]),
    ],
)
def test_boundary_layers_have_widths_of_their_own(bits: Any, own: Any, expected: list[Any]) -> None:
    press = TurboQuant(3, boundary_layers=1, boundary_bits=bits, layer_bits=own, recent_tokens=16)
    layers = read(tiny_model("llama"), press, IDS).layers
    found = [
        (spec_of(layer, "key").bits, spec_of(layer, "value").bits) if isinstance(layer, PackedLayer) else None
        for layer in layers
    ]
    assert found == expected


def test_more_boundary_than_layers_protects_all() -> None:
    layers = read(tiny_model("llama"), TurboQuant(3, boundary_layers=9), IDS).layers
    assert not any(isinstance(layer, PackedLayer) for layer in layers)


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(InvalidInputError, match="names layer 3, but the model has 3 layers"):
        read(tiny_model("llama"), TurboQuant(layer_bits={3: 8}), IDS)


def test_settings_reach_the_codec() -> None:
    press = TurboQuant(
        4,
        rotation="haar",
        seed=9,
        scale="norm",
        codebook="lloyd_max",
        estimator="prod",
        sink_tokens=2,
        recent_tokens=32,
    )
    layer = packed_layers(read(tiny_model("llama"), press, IDS))[1]
    expected = CodecSpec(HEAD_DIM, 4, "key", "haar", 9, "norm", "lloyd_max", "prod")
    assert spec_of(layer, "key") == expected
    assert spec_of(layer, "value").estimator == "mse"
    assert (layer.settings.sink_tokens, layer.settings.recent_tokens) == (2, 32)
    assert layer.tokens_seen == 420 and layer.packed_tokens == 384


def test_codec_factory_is_asked_per_layer() -> None:
    asked = []

    def factory(head_dim: int, role: str, layer_idx: int) -> RawPages:
        asked.append((head_dim, role, layer_idx))
        return RawPages(head_dim, 32)

    read(tiny_model("llama"), TurboQuant(codec=factory), IDS)
    assert set(asked) == {(HEAD_DIM, role, layer) for role in ("key", "value") for layer in range(3)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_bits": {1: 8}}, r"layer_bits\[1\] is 8, but codec"),
        ({"boundary_layers": 1, "boundary_bits": (16, 4)}, r"boundary_bits is \(16, 4\), but codec"),
    ],
)
def test_widths_of_layers_beside_a_codec(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        TurboQuant(codec=raw_pages, **options)


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({"layer_bits": {0: 16}}, [False, True, True]),
        ({"layer_bits": {-1: (16, 16)}}, [True, True, False]),
        ({"boundary_layers": 1}, [False, True, False]),
    ],
)
def test_layers_stay_unpacked_beside_a_codec(options: dict[str, Any], packed: list[bool]) -> None:
    cache = read(tiny_model("llama"), TurboQuant(codec=raw_pages, recent_tokens=16, **options), IDS)
    assert [isinstance(layer, PackedLayer) for layer in cache.layers] == packed


@pytest.mark.parametrize("mean_key", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_statistics_are_taken_as_asked(mean_key: bool, balance: bool) -> None:
    press = TurboQuant(4, mean_key=mean_key, balance=balance, recent_tokens=16)
    for layer in packed_layers(read(tiny_model("qwen2"), press, IDS)):
        assert layer.tokens is not None and layer.tokens.key_transform is not None
        assert (layer.tokens.key_transform.mean is not None) == mean_key
        assert (layer.tokens.key_transform.weight is not None) == balance


def test_packed_numbers_are_close_to_the_exact_ones() -> None:
    model = tiny_model("llama")
    exact = read(model, None, IDS)
    for bits, limit in ((8, 0.001), (4, 0.02), (2, 0.2)):
        for layer, plain in zip(packed_layers(read(model, TurboQuant(bits), IDS)), exact.layers, strict=True):
            for got, expected in ((layer.keys, plain.keys), (layer.values, plain.values)):
                error = (got.dense() - expected).square().sum() / expected.square().sum()
                assert 0 < error < limit, (bits, error)


def test_raw_tensors_are_freed_layer_by_layer() -> None:
    model, alive = tiny_model("llama"), []

    def watch(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        still = [earlier for earlier in references if earlier() is not None]
        alive.append(len(still))
        references.extend(weakref.ref(tensor) for tensor in (layer.keys, layer.values))

    references: list[Any] = []
    # Registered before the press: it sees each layer's own tensors before they are packed.
    handles = [layer.self_attn.register_forward_hook(watch, with_kwargs=True) for layer in model.model.layers]
    try:
        cache = read(model, Compose([SnapKV(0.5), TurboQuant(recent_tokens=16)]), IDS)
    finally:
        for handle in handles:
            handle.remove()
    gc.collect()
    assert alive == [0, 0, 0]
    assert all(reference() is None for reference in references) and len(packed_layers(cache)) == 3


def test_works_under_autograd() -> None:
    model = tiny_model("llama")
    cache = DynamicCache()
    with TurboQuant(recent_tokens=16)(model):
        output = model.model(input_ids=IDS, past_key_values=cache)
    assert output.last_hidden_state.requires_grad
    for layer in packed_layers(cache):
        assert layer.tokens is not None and layer.packed_tokens > 0
        kept = layer.tokens.sinks.keys, layer.tokens.recent.values, layer.keys.dense(), layer.values.dense()
        assert not any(tensor.requires_grad for tensor in kept)


def test_the_press_can_be_used_again() -> None:
    model, press = tiny_model("llama"), Compose([SnapKV(0.5), TurboQuant(recent_tokens=16)])
    first, second = read(model, press, IDS), read(model, press, IDS)
    for one, other in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.keys.dense(), other.keys.dense())


def test_two_contexts_in_one_use() -> None:
    model, press = tiny_model("llama"), lossless()
    caches, contexts = (DynamicCache(), DynamicCache()), (IDS, prompt(300, seed=1))
    with torch.inference_mode(), press(model):
        for cache, ids in zip(caches, contexts, strict=True):
            model.model(input_ids=ids, past_key_values=cache)
    for cache, ids in zip(caches, contexts, strict=True):
        assert answer(model, cache, ids.shape[1]) == answer(model, read(model, None, ids), ids.shape[1])


def test_pack_a_filled_cache() -> None:
    model = tiny_model("llama")
    cache, inside = read(model, None, IDS), read(model, TurboQuant(balance=False), IDS)
    TurboQuant(balance=False).pack_cache(model, cache, tokens_seen=500)
    for one, other in zip(packed_layers(cache), inside.layers, strict=True):
        assert torch.equal(one.keys.dense(), other.keys.dense()) and one.tokens_seen == 500


def test_batch_with_padding_and_no_eviction() -> None:
    model, ids = tiny_model("llama"), prompt(420, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :60] = 0

    def logits(press: Any) -> torch.Tensor:
        cache = DynamicCache()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.inference_mode(), press(model):
            model.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        longer = torch.cat([mask, mask[:, :1] | 1], dim=1)
        with torch.inference_mode():
            step = model(
                ids[:, :1], attention_mask=longer, position_ids=positions[:, -1:] + 1, past_key_values=cache
            )
        return step.logits

    torch.testing.assert_close(logits(lossless()), logits(Compose([ThinK(0.0)])), rtol=1e-4, atol=1e-4)


# --- order of tokens ---


WAYS: dict[str, Any] = {
    "Compose": Compose,
    "ComposedPress": kvpress.ComposedPress,
    "hooks of Compose": lambda presses: kvpress.PrefillDecodingPress(prefilling_press=Compose(presses)),
}


@pytest.mark.parametrize("way", WAYS)
def test_survivors_are_packed_in_the_order_of_the_text(way: str) -> None:
    model = tiny_model("llama")
    exact = read(model, None, IDS).layers
    press = WAYS[way]([kvpress.SnapKVPress(0.5), lossless()])
    for layer, plain in zip(packed_layers(read(model, press, IDS)), exact, strict=True):
        found = (layer.keys.dense().unsqueeze(3) == plain.keys.unsqueeze(2)).all(-1)  # [B, Hkv, K, N]
        assert torch.equal(found.sum(-1), torch.ones_like(found.sum(-1)))
        positions = found.int().argmax(-1)
        assert bool((positions.diff(dim=-1) > 0).all())
        assert torch.equal(positions[..., -1], torch.full_like(positions[..., -1], 419))


@pytest.mark.parametrize(
    ("evictors", "side"),
    [([SnapKV(0.5), ThinK(0.5)], "values"), ([Merging(Knorm(0.5))], "keys")],
    ids=["ThinK changes keys", "Merging changes values"],
)
@pytest.mark.parametrize("way", ["Compose", "hooks of Compose"])
def test_changed_survivors_are_put_in_order_too(way: str, evictors: list[Any], side: str) -> None:
    model, press = tiny_model("llama"), WAYS[way]([*evictors, lossless()])
    exact = read(model, None, IDS).layers
    last = torch.arange(420)
    for layer, plain in zip(packed_layers(read(model, press, IDS)), exact, strict=True):
        kept, tokens = getattr(layer, side).dense(), getattr(plain, side)
        same = (kept.unsqueeze(3) == tokens.unsqueeze(2)).all(-1)  # [B, Hkv, K, N]
        assert bool(same.any(-1).all())
        # In layer 0 the values of equal ids are equal: the first place that fits must not go back.
        latest = torch.where(same, last, -1).amax(-1)
        first = torch.where(same, last, 420).amin(-1)
        assert bool((latest[..., 1:] > first[..., :-1]).all())


def test_sinks_of_streaming_llm_are_pinned() -> None:
    """kvpress returns its survivors in no order; the first n_sink tokens of the text must stay exact."""
    model = tiny_model("llama")
    exact = read(model, None, IDS).layers
    press = Compose([StreamingLLM(0.5, n_sink=8), TurboQuant(2, sink_tokens=4, recent_tokens=16)])
    assert press.quantizer is not None and press.quantizer.sink_tokens == 4
    for layer, plain in zip(packed_layers(read(model, press, IDS)), exact, strict=True):
        assert layer.settings.sink_tokens == 8
        for got, expected in ((layer.keys.dense(), plain.keys), (layer.values.dense(), plain.values)):
            assert torch.equal(got[:, :, :8], expected[:, :, :8])
            assert torch.equal(got[:, :, -16:], expected[:, :, -16:])
            assert not torch.equal(got[:, :, 8:12], expected[:, :, -202:-198])


def test_fewer_sinks_than_the_quantizer_pins() -> None:
    press = Compose([StreamingLLM(0.5, n_sink=2), TurboQuant(2, sink_tokens=6, recent_tokens=16)])
    layers = packed_layers(read(tiny_model("llama"), press, IDS))
    assert [layer.settings.sink_tokens for layer in layers] == [6, 6, 6]


def test_a_float32_model_under_autocast() -> None:
    """The keys that a plain cache holds under the same autocast, to the precision of 8 bits."""
    model, press = tiny_model("llama"), TurboQuant(4, key_bits=8, recent_tokens=16)
    with torch.autocast("cpu", torch.bfloat16):
        exact, cache = read(model, None, IDS), read(model, press, IDS)
        for plain, layer in zip(exact.layers, packed_layers(cache), strict=True):
            assert layer.packed_tokens == 384
            assert (layer.keys - plain.keys).norm() < 0.02 * plain.keys.norm()
        answer(model, cache, IDS.shape[1], tokens=150)
    assert packed_layers(cache)[0].packed_tokens == 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_values_beyond_float16_cost_no_accuracy(dtype: torch.dtype) -> None:
    """Values times 2**17 and what reads them over 2**17: another model with the same logits."""
    usual, wide = (copy.deepcopy(tiny_model("llama")).to(dtype) for _ in range(2))
    for layer in wide.model.layers:
        layer.self_attn.v_proj.weight.data *= 2**17
        layer.self_attn.o_proj.weight.data /= 2**17
    exact = logits(usual, read(usual, None, IDS))
    assert torch.equal(logits(wide, read(wide, None, IDS)), exact)
    press = TurboQuant(4, recent_tokens=16)
    caches = [read(model, press, IDS) for model in (usual, wide)]
    assert caches[1].layers[1].tokens.value_pages.planes["scale0"].abs().max() > 2**16
    errors = [
        (logits(model, cache) - exact).norm() for model, cache in zip((usual, wide), caches, strict=True)
    ]
    assert errors[1] < 1.1 * errors[0]
    used = [cache_memory(cache).layers[1].packed_bytes for cache in caches]
    assert used[1] - used[0] == 2 * 384 * 2  # heads, packed tokens, bytes more of a value's scale
    narrow = TurboQuant(4, recent_tokens=16, scale_dtype="float16")
    with pytest.raises(InvalidInputError, match=r'a value has a scale of .* scale_dtype="float32"'):
        read(wide, narrow, IDS)


def logits(model: Any, cache: DynamicCache) -> torch.Tensor:
    """Of the next token, behind a copy of the cache."""
    position = torch.tensor([[IDS.shape[1]]])
    with torch.inference_mode():
        output = model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(cache), position_ids=position)
    return output.logits[0, -1].float()
