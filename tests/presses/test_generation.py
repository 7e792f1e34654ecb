"""With a lossless codec, what comes after eviction and packing is what kvpress gives without packing."""

from typing import Any

import kvpress
import numpy as np
import pytest
import torch
from kvpress.presses.fastkvzip_press import FastKVzipGate
from transformers import DynamicCache, PreTrainedModel

from quantpress import presses
from quantpress.cache import PackedLayer
from quantpress.presses import (
    DMS,
    LUKV,
    TOVA,
    AdaKV,
    ChunkKV,
    Compose,
    CriticalAdaKV,
    ExpectedAttention,
    FastKVzip,
    Finch,
    KeyDiff,
    KeyRerotation,
    Knorm,
    KVCompose,
    LagKV,
    Merging,
    PyramidKV,
    Random,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    ThinK,
    TurboQuant,
)
from tests.presses.reading import answer, lossless, multimodal_gemma3, read
from tests.tiny_models import FAMILIES, prompt, tiny_model

TOKENS = 420  # 210 survivors of 0.5: 4 sinks, one page, the rest recent
IDS = prompt(TOKENS)


def kept_tokens(cache: DynamicCache) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def packed(cache: DynamicCache) -> list[bool]:
    return [isinstance(layer, PackedLayer) and layer.packed_tokens > 0 for layer in cache.layers]


def model_of(family: str) -> PreTrainedModel:
    return multimodal_gemma3() if family == "gemma3" else tiny_model(family)


def check_equal(model: PreTrainedModel, plain: Any, packing: Any, position: int = TOKENS) -> None:
    expected, got = read(model, plain, IDS), read(model, packing, IDS)
    assert kept_tokens(got) == kept_tokens(expected)
    full = [not layer.is_sliding for layer in expected.layers]
    assert packed(got) == full
    before = answer(model, read(model, None, IDS), TOKENS)
    tokens = answer(model, expected, position)
    assert tokens != before, "the press changes nothing here: the comparison would prove nothing"
    assert answer(model, got, position) == tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["Compose", "ComposedPress"])
def test_snapkv_on_every_family(family: str, way: str) -> None:
    if way == "Compose":
        packing: Any = Compose([SnapKV(0.5), lossless()])
    else:
        packing = kvpress.ComposedPress([kvpress.SnapKVPress(0.5), lossless()])
    check_equal(model_of(family), kvpress.SnapKVPress(0.5), packing)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_evicted(family: str) -> None:
    model = tiny_model(family)
    cache = read(model, lossless(), IDS)
    assert packed(cache) == [not layer.is_sliding for layer in read(model, None, IDS).layers]
    assert answer(model, cache, TOKENS) == answer(model, read(model, None, IDS), TOKENS)


EVICTORS = {
    "SnapKV, ThinK": ([SnapKV(0.5), ThinK(0.5)], [kvpress.SnapKVPress(0.5), kvpress.ThinKPress(0.5)]),
    "ThinK": ([ThinK(0.5)], [kvpress.ThinKPress(0.5)]),
    "StreamingLLM": ([StreamingLLM(0.5)], [kvpress.StreamingLLMPress(0.5)]),
    "Knorm, KeyDiff": ([Knorm(0.3), KeyDiff(0.3)], [kvpress.KnormPress(0.3), kvpress.KeyDiffPress(0.3)]),
    "ExpectedAttention": ([ExpectedAttention], [kvpress.ExpectedAttentionPress(0.5)]),
    "TOVA": ([TOVA], [kvpress.TOVAPress(0.5)]),
    "LagKV": ([LagKV(lag_size=32)], [kvpress.LagKVPress(0.5, lag_size=32)]),
    "Random": ([Random(seed=3)], [kvpress.RandomPress(0.5, seed=3)]),
    "ChunkKV": ([ChunkKV], [kvpress.ChunkKVPress(kvpress.SnapKVPress(0.5))]),
    "Merging": ([Merging], [kvpress.MergingPress(kvpress.SnapKVPress(0.5))]),
}


@pytest.mark.parametrize("name", EVICTORS)
def test_other_evictors(name: str) -> None:
    ours, theirs = EVICTORS[name]
    plain = kvpress.ComposedPress(theirs) if len(theirs) > 1 else theirs[0]
    check_equal(tiny_model("llama"), plain, Compose([*ours, lossless()]))


def test_key_rerotation_goes_on_at_the_number_of_survivors() -> None:
    model = tiny_model("llama")
    plain = kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(0.5))
    packing = Compose([KeyRerotation(StreamingLLM(0.5)), lossless()])
    check_equal(model, plain, packing, position=TOKENS // 2)
    layer = read(model, packing, IDS).layers[0]
    assert isinstance(layer, PackedLayer) and layer.tokens_seen == TOKENS // 2


HEAD_WISE = {
    "AdaKV": ([AdaKV], lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.5))),
    "CriticalAdaKV": ([CriticalAdaKV], lambda: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(0.5))),
    "DMS": ([DMS(Knorm(), threshold=-12)], lambda: kvpress.DMSPress(kvpress.KnormPress(), threshold=-12)),
}


@pytest.mark.parametrize("name", HEAD_WISE)
def test_head_wise_presses_mask_the_same_slots(name: str) -> None:
    ours, theirs = HEAD_WISE[name]
    model = tiny_model("llama")
    unpressed = answer(model, read(model, None, IDS), TOKENS)
    expected = answer(model, read(model, theirs(), IDS), TOKENS)
    cache = read(model, Compose([*ours, lossless()]), IDS)
    assert packed(cache) == [True] * len(cache.layers)
    assert answer(model, cache, TOKENS) == expected != unpressed


def test_budgets_per_head() -> None:
    press, curves = LUKV(Knorm(), compression_ratio=0.5), np.full((99, 3, 2), 0.5)
    curves[:, :, 1] = 0.9
    press._budget_curves = (
        curves  # measured for one model; what is tested here is only what follows from them
    )
    model = tiny_model("llama")
    expected = answer(model, read(model, press, IDS), TOKENS)
    assert answer(model, read(model, Compose([press, lossless()]), IDS), TOKENS) == expected
    assert expected != answer(model, read(model, None, IDS), TOKENS)


class Tokenizer:
    """Just enough of a tokenizer for KVzip, which looks one up by the model's name."""

    chat_template = None

    @classmethod
    def from_pretrained(cls, name: str) -> "Tokenizer":
        return cls()

    def encode(self, text: str, **options: Any) -> torch.Tensor:
        return torch.tensor([[ord(letter) % 250 + 2 for letter in text]]).reshape(1, -1).long()


@pytest.mark.parametrize("name", ["KVzip", "KVgrad"])
def test_presses_that_read_the_context_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They score when their context ends and mask slots; the cache is packed after that."""
    monkeypatch.setattr("kvpress.presses.kvzip_press.AutoTokenizer", Tokenizer)
    ours, theirs = getattr(presses, name)(0.5), getattr(kvpress, name + "Press")(0.5)
    model = tiny_model("llama")
    unpressed = answer(model, read(model, None, IDS), TOKENS)
    expected = answer(model, read(model, theirs, IDS), TOKENS)
    for parameter in ("rotary_emb",):  # kvpress leaves those behind
        for layer in model.model.layers:
            delattr(layer.self_attn, parameter)
    vars(model.model).pop("forward", None)
    cache = read(model, Compose([ours, lossless()]), IDS)
    assert packed(cache) == [True] * 3 and kept_tokens(cache) == [TOKENS] * 3
    assert answer(model, cache, TOKENS) == expected != unpressed
    assert "forward" not in vars(model.model) and not hasattr(model.model.layers[0].self_attn, "rotary_emb")


def test_gates() -> None:
    model = tiny_model("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # kvpress finds no fake key for every choice of slots
        gates = [FastKVzipGate(layer, 128, 2, 2, torch.float32) for layer in range(3)]
    ours, theirs = FastKVzip(0.5), kvpress.FastKVzipPress(0.5)
    ours.gates, theirs.gates = gates, gates
    expected = answer(model, read(model, theirs, IDS), TOKENS)
    cache = read(model, Compose([ours, lossless()]), IDS)
    assert packed(cache) == [True] * 3
    assert answer(model, cache, TOKENS) == expected


def test_finch_goes_on_at_the_number_of_survivors() -> None:
    """The delimiter and the window behind it come with the context; the delimiter is taken out on the way."""
    delimiter, model = 1, tiny_model("llama")
    ids = torch.cat([IDS[:, :-21], torch.tensor([[delimiter]]), IDS[:, -20:]], dim=1)
    caches = []
    for press in (kvpress.FinchPress(0.5), Finch(0.5)):
        press.delimiter_token_id = delimiter
        caches.append(read(model, Compose([press, lossless()]) if caches else press, ids))
    plain, cache = caches
    kept = plain.get_seq_length()
    assert kept_tokens(cache) == kept_tokens(plain) == [kept] * 3 and packed(cache) == [True] * 3
    assert cache.layers[0].tokens_seen == kept < TOKENS
    assert answer(model, cache, kept) == answer(model, plain, kept)


def test_masked_slots_move_with_sorted_survivors() -> None:
    """SnapKV leaves survivors unsorted, AdaKV names slots among those, packing sorts them."""
    model = tiny_model("llama")
    evictors = [SnapKV(0.5), AdaKV(Knorm(0.5))]
    expected = answer(model, read(model, Compose(evictors), IDS), TOKENS)
    assert answer(model, read(model, Compose([*evictors, lossless()]), IDS), TOKENS) == expected
    assert expected != answer(model, read(model, SnapKV(0.5), IDS), TOKENS)


def test_kvcompose_is_packed_after_its_exit() -> None:
    """It evicts when its context ends, a different number of tokens in each layer."""
    model = tiny_model("llama")
    expected = read(model, kvpress.KVComposePress(compression_ratio=0.5), IDS)
    vars(model.model).pop("forward", None)  # kvpress leaves it on the model; Compose does not
    got = read(model, Compose([KVCompose(compression_ratio=0.5), lossless()]), IDS)
    assert kept_tokens(got) == kept_tokens(expected)
    assert packed(got) == [True] * 3 and "forward" not in vars(model.model)
    for theirs, ours in zip(expected.layers, got.layers, strict=True):
        assert torch.equal(ours.keys.dense(), theirs.keys)
    for layer in read(model, Compose([KVCompose, TurboQuant(recent_tokens=16)]), IDS).layers:
        assert layer.tokens.key_transform.weight is not None  # the queries of the prefill were kept for it


@pytest.mark.parametrize(
    "press",
    [PyramidKV(0.5, window_size=8, beta=2), SimLayerKV(0.31, n_recent=250)],
    ids=lambda press: type(press).__name__,
)
def test_layers_of_different_lengths(press: Any) -> None:
    """The model's one mask does not fit every layer; kvpress itself fails at a question of several tokens."""
    model, ids = tiny_model("llama"), prompt(800)
    plain, got = read(model, press, ids), read(model, Compose([press, lossless()]), ids)
    assert kept_tokens(got) == kept_tokens(plain) and len(set(kept_tokens(got))) > 1
    assert packed(got) == [True] * 3
    assert len(answer(model, got, 800)) == 12


def test_inside_another_press_that_calls_hooks_only() -> None:
    model = tiny_model("llama")
    inner = Compose([SnapKV(0.5), lossless()])
    chained = read(model, kvpress.PrefillDecodingPress(prefilling_press=inner), IDS)
    assert packed(chained) == [True] * 3
    expected = read(model, kvpress.SnapKVPress(0.5), IDS)
    assert answer(model, chained, TOKENS) == answer(model, expected, TOKENS)


def test_generate() -> None:
    model = tiny_model("llama")
    expected = model.generate(IDS, max_new_tokens=10, do_sample=False)
    with lossless()(model):
        got = model.generate(IDS, max_new_tokens=10, do_sample=False)
    assert torch.equal(got, expected)


def test_sliding_layers_stay_plain() -> None:
    model = tiny_model("gemma3")
    ids = prompt(600)
    for make_cache in (lambda: DynamicCache(config=model.config), DynamicCache):
        plain = read(model, None, ids, make_cache())
        cache = read(model, Compose([SnapKV(0.5), TurboQuant(4)]), ids, make_cache())
        assert packed(cache) == [False, True, True]
        assert type(cache.layers[0]) is type(plain.layers[0])
        assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
        assert kept_tokens(cache)[1:] == [300, 300]
