"""Demote: every token stays, in two widths; what falls is what the press would evict."""

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress import presses
from quantpress.cache import PackedLayer, cache_memory
from quantpress.cache.attention.dispatch import _attend_view
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.fixed.cache import FixedCache
from quantpress.cache.fixed.fixable import unfixable
from quantpress.cache.saved.layers import cache_of, cache_parts
from quantpress.cache.tokens.demotion import Demotion
from quantpress.errors import CompositionError, InvalidInputError, UnsupportedBitsError
from quantpress.presses import AdaKV, ChunkKV, Compose, Decoding, Demote, Knorm, KVzip, SnapKV, TurboQuant
from tests.cache.caches import lossless as raw
from tests.cache.caches import scalar
from tests.cache.saved.test_layers import again
from tests.cache.test_layer import states
from tests.cache.tokens.test_ragged import DIM, GROUP, HEADS, MODULE
from tests.presses.matrix import ours
from tests.presses.reading import answer, lossless, read
from tests.tiny_models import prompt, tiny_model

TOKENS = 700
IDS = prompt(TOKENS, seed=5)


@pytest.mark.parametrize(
    "evictors",
    [[], [SnapKV(0.2, window_size=16)], [Knorm(0.3), SnapKV(0.2, window_size=16)]],
    ids=["alone", "snapkv", "knorm snapkv"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_nothing_is_lost(family: str, evictors: list[Any]) -> None:
    """With a lossless codec, the answer is that of the same without Demote."""
    model = tiny_model(family)
    expected = answer(model, read(model, Compose([*evictors, lossless()]), IDS), TOKENS)
    for detect in (0, 3):
        quantizer = lossless(detect_sinks=detect)
        cache = read(model, Compose([*evictors, Demote(Knorm(0.6)), quantizer]), IDS)
        assert cache.layers[-1].tokens.demoted_tokens >= 128
        assert cache.layers[-1].get_seq_length() == cache.layers[-1].keys.shape[2] <= TOKENS
        assert answer(model, cache, TOKENS) == expected


def test_what_falls_is_what_the_press_would_evict() -> None:
    """Of the tokens between the windows, those with the largest keys: Knorm's own scores."""
    model = tiny_model("llama")
    keys = [layer.keys for layer in read(model, None, IDS).layers]
    cache = read(model, Compose([Demote(Knorm(0.5)), lossless()]), IDS)
    for before, layer in zip(keys, cache.layers, strict=True):
        count = layer.tokens.demoted_tokens
        assert count == TOKENS // 2 // 128 * 128
        middle = before[:, :, 4 : TOKENS - 16]
        largest = middle.norm(dim=-1).topk(count, dim=-1).indices.sort(dim=-1).values
        expected = middle.gather(2, largest.unsqueeze(-1).expand(-1, -1, -1, middle.shape[-1]))
        found = layer.keys[:, :, : 4 + count] + 0
        assert torch.equal(found[:, :, 4:], expected) and torch.equal(found[:, :, :4], before[:, :, :4])


@pytest.mark.parametrize(
    "name", ["Compactor", "CUR", "ExpectedAttention", "KeyDiff", "LagKV", "SnapKV", "TOVA"]
)
def test_scores_of_kvpress_alone(name: str) -> None:
    """What kvpress's contexts give to attention modules is there, and gone afterwards."""
    model = tiny_model("qwen3")
    before = [sorted(vars(layer.self_attn)["_modules"]) for layer in model.model.layers]
    cache = read(model, Compose([Demote(getattr(presses, name)(0.5)), lossless()]), IDS)
    assert cache.layers[-1].tokens.demoted_tokens == 256
    assert answer(model, cache, TOKENS) == answer(model, read(model, lossless(), IDS), TOKENS)
    assert [sorted(vars(layer.self_attn)["_modules"]) for layer in model.model.layers] == before


@pytest.mark.parametrize("tokens", [9, 40, 205])
def test_chunks_fall_as_a_whole(tokens: int) -> None:
    """Those that kvpress's ChunkKV evicts; the last one is shorter, or the only one."""
    press, keys = ChunkKV(Knorm(0.5)), torch.randn(1, 3, tokens, DIM)
    module: Any = SimpleNamespace(head_dim=DIM)
    arguments: Any = (module, keys, keys, keys + 1, None, {})
    kept, _ = pruned = kvpress.ChunkKVPress(kvpress.KnormPress(0.5)).compress(*arguments)
    torch.testing.assert_close(press.compress(*arguments), pruned, rtol=0, atol=0)
    scores = press.score(module, keys, keys, keys, None, {})
    assert scores.shape == keys.shape[:3]
    if tokens > press.chunk_length:
        best = scores[0, 0].topk(kept.shape[2]).indices.sort().values
        torch.testing.assert_close(keys[:, :, best], kept, rtol=0, atol=0)
    else:
        assert scores.unique().numel() == 1


def test_chunks_of_a_model_fall() -> None:
    model = tiny_model("llama")
    cache = read(model, Compose([Demote(ChunkKV(Knorm(0.6))), lossless()]), IDS)
    assert cache.layers[-1].tokens.demoted_tokens == 384


def test_bytes_are_those_of_two_widths() -> None:
    model, ids = tiny_model("llama"), prompt(2048, seed=4)
    sizes = {}
    for name, press in {
        "2": TurboQuant(2, recent_tokens=16),
        "both": Compose([Demote(Knorm(0.5), bits=2), TurboQuant(4, recent_tokens=16)]),
        "4": TurboQuant(4, recent_tokens=16),
    }.items():
        memory = cache_memory(read(model, press, ids))
        assert memory.layers[0].tokens == memory.layers[0].tokens_kept == 2048
        sizes[name] = memory
    packed = {name: memory.packed_bytes for name, memory in sizes.items()}
    fallen = 2048 // 2 // 128 * 128
    share = fallen / sizes["4"].layers[0].packed_tokens
    assert packed["both"] == pytest.approx(share * packed["2"] + (1 - share) * packed["4"], rel=1e-6)
    assert sizes["2"].total_bytes < sizes["both"].total_bytes < sizes["4"].total_bytes


def test_better_than_eviction_and_than_two_bits() -> None:
    """Logits behind half of the tokens at 2 bits and half at 4: nearer than 2 bits alone, or half at 4."""
    model = tiny_model("llama")

    def logits(press: Any) -> torch.Tensor:
        with torch.inference_mode():
            ids = prompt(40, seed=2)
            positions = torch.arange(TOKENS, TOKENS + 40).unsqueeze(0)
            found: torch.Tensor = model(
                ids, past_key_values=read(model, press, IDS), position_ids=positions
            ).logits
        return found

    expected = logits(None)
    quantizer = TurboQuant(4, recent_tokens=16)

    def error(press: Any) -> float:
        return float((logits(press) - expected).norm() / expected.norm())

    fallen = error(Compose([Demote(SnapKV(0.5, window_size=16)), quantizer]))
    assert error(quantizer) < fallen < error(TurboQuant(2, recent_tokens=16))
    assert fallen < error(Compose([SnapKV(0.5, window_size=16), quantizer]))


def mixed(tokens: int = TOKENS, fall: int = 300, exact: bool = False) -> PackedLayer:
    keys, values = states(tokens)
    low = raw() if exact else scalar(bits=2)
    demotion = Demotion(torch.rand(2, 2, tokens), fall, low.key_codec, low.value_codec)
    settings = raw(recent_tokens=16) if exact else scalar(bits=4, recent_tokens=16)
    return PackedLayer.from_states(keys, values, settings, demotion=demotion)


@pytest.mark.parametrize("queries", [1, 5, 200])
def test_attention_over_both_widths(queries: int) -> None:
    """Against torch's, on the decoded tokens."""
    layer = mixed()
    query, (keys, values) = torch.randn(2, HEADS * GROUP, queries, DIM), states(queries, seed=9)
    key, value = layer.update(keys, values)
    assert isinstance(key, PackedStates) and key.packed is not None
    got = _attend_view(MODULE, query, key.packed, None, {}).transpose(1, 2)
    whole = [(states + 0).repeat_interleave(GROUP, dim=1) for states in (key, value)]
    count = TOKENS + queries
    seen = torch.ones(queries, count, dtype=torch.bool).tril(count - queries)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *whole, attn_mask=seen)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_steps_at_fixed_addresses() -> None:
    """Attention and tokens are those of a growing layer, over a flush, and back."""
    cache, other = DynamicCache(), mixed()
    cache.layers.append(copy.deepcopy(other))
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=100)
    addresses = fixed.addresses()
    for number in range(100):
        added, query = states(1, seed=number), torch.randn(2, HEADS * GROUP, 1, DIM)
        with fixed.step():
            views = [layer.update(*added)[0].packed for layer in (cache.layers[0], other)]  # type: ignore[attr-defined]
            if number % 9 == 0:
                got, expected = (_attend_view(MODULE, query, view, None, {}) for view in views)  # type: ignore[arg-type]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        fixed.flush()
    assert fixed.addresses() == addresses and cache.layers[0].packed_tokens == other.packed_tokens == 768
    assert torch.equal(cache.layers[0].keys + 0, other.keys + 0)  # type: ignore[operator]


def test_a_layer_of_demoted_pages_alone_waits_for_another() -> None:
    cache = DynamicCache()
    cache.layers.append(mixed(tokens=400, fall=384))
    assert cache.layers[0].packed_tokens == 256
    assert unfixable(cache) == ["layer 0 of the cache has too few tokens to pack any"]


def test_what_comes_later_and_what_is_taken_away() -> None:
    layer = mixed(exact=True)
    context, count = layer.keys + 0, layer.tokens.demoted_tokens  # type: ignore[union-attr]
    snapshot, view = layer.snapshot(), layer.view()
    added = states(400, seed=3)
    layer.update(*added)
    assert layer.get_seq_length() == TOKENS + 400
    assert torch.equal((layer.keys + 0)[:, :, :TOKENS], context)
    layer.crop(TOKENS)
    assert torch.equal(layer.keys + 0, context)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.keys + 0, context)
    layer.batch_select_indices(torch.tensor([1, 1, 0]))
    assert torch.equal(layer.keys + 0, context[[1, 1, 0]])
    assert torch.equal(view.select(torch.tensor([1])).dense_keys(), context[1:])
    layer.restore(snapshot)
    assert torch.equal(layer.keys + 0, context) and torch.equal(view.dense_keys(), context)
    part = layer.keys[:, :, : 4 + count - 50]
    assert torch.equal(part + 0, context[:, :, : 4 + count - 50])
    layer.crop(4 + count)
    assert torch.equal(layer.keys + 0, context[:, :, : 4 + count])
    with pytest.raises(InvalidInputError, match=f"cut such a layer to {4 + count} tokens or more"):
        layer.crop(4 + count - 1)
    layer.crop(-layer.get_seq_length())
    assert layer.get_seq_length() == 0 == layer.packed_tokens


def test_saved_and_loaded() -> None:
    layer = mixed()
    cache = DynamicCache()
    cache.layers = [layer]
    other = again(cache).layers[0]
    added = states(200, seed=3)
    for one in (layer, other):
        one.update(*added)
    assert torch.equal(layer.keys + 0, other.keys + 0) and torch.equal(layer.values + 0, other.values + 0)
    assert other.tokens.demoted.key_codec == layer.tokens.demoted.key_codec  # type: ignore[union-attr]
    parts = cache_parts(cache)
    coarse = parts.inner["0"].inner["tokens"].inner["coarse"]
    planes = coarse.inner["pages"].inner["keys"].tensors
    planes["codes0"] = planes["codes0"][:, :, :, 1:]
    with pytest.raises(InvalidInputError, match="do not fit together: the pages"):
        cache_of(parts)


def test_less_than_a_page_falls_not_at_all() -> None:
    layer = mixed(fall=127)
    assert layer.tokens is not None and layer.tokens.demoted is None and layer.packed_tokens == 640
    short = mixed(tokens=100)
    assert short.tokens is not None and not short.tokens.readable


@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": 2}], ids=str
)
def test_in_the_pipeline(way: dict[str, Any]) -> None:
    cache = DynamicCache()
    composed = Compose([Demote(Knorm(0.5)), lossless()])
    assert ours("KnormPress", composed, cache=cache, **way) == ours("KnormPress", None, **way)
    assert cache.layers[0].tokens.demoted_tokens and not unfixable(cache)
    assert composed.compression_ratio == 0.0


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "alone": (lambda: [Demote()], "Demote evicts nothing by itself; put TurboQuant"),
    "not last": (lambda: [Demote(), Knorm(), TurboQuant()], "put Demote last before the quantizer"),
    "head-wise behind": (lambda: [Demote(), AdaKV(), TurboQuant()], "put Demote last before the quantizer"),
    "head-wise before": (lambda: [AdaKV(), Demote(), TurboQuant()], "AdaKV names slots of the cache"),
    "two": (lambda: [Demote(), Demote(), TurboQuant()], "put Demote last before the quantizer"),
    "decoding": (lambda: [Demote(), Decoding(Knorm(0.0)), TurboQuant()], "Demote moves tokens of the cache"),
    "at exit": (lambda: [KVzip(0.5), Demote(), TurboQuant()], "use it as the only evictor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(CompositionError, match=message):
        Compose(make())


def test_alone_it_is_no_context() -> None:
    """It would score tokens for nobody."""
    with pytest.raises(CompositionError, match="put TurboQuant"), Demote(Knorm(0.5))(tiny_model("llama")):
        pass


def test_wrong_arguments() -> None:
    with pytest.raises(UnsupportedBitsError):
        Demote(bits=5)
    with pytest.raises(InvalidInputError, match="give one that scores tokens"):
        Demote(TurboQuant())  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="set the compression_ratio of its press"):
        Demote().compression_ratio = 0.5
    layer = mixed()
    for use in (
        lambda: layer.keep(torch.arange(9).expand(2, 2, -1)),
        lambda: layer.evict(torch.zeros(2, 2, TOKENS, dtype=torch.bool)),
    ):
        with pytest.raises(InvalidInputError, match="packed in fewer bits, and such a layer cannot evict"):
            use()
    model, ids = tiny_model("llama"), prompt(TOKENS, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    with (
        pytest.raises(InvalidInputError, match="Demote moves tokens"),
        torch.inference_mode(),
        Compose([Demote(Knorm(0.5)), TurboQuant()])(model),
    ):
        model.model(ids, attention_mask=mask, past_key_values=DynamicCache())
