"""Every press that kvpress exports: alone, in front of TurboQuant, and in pairs."""

import functools
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from quantpress.cache import PackedLayer, cache_memory
from quantpress.errors import CompositionError
from quantpress.presses import (
    AdaKV,
    ChunkKV,
    Compose,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    KeyRerotation,
    Knorm,
    KVzip,
    LagKV,
    Merging,
    PerLayerCompression,
    PyramidKV,
    SnapKV,
    StreamingLLM,
    ThinK,
    TurboQuant,
)
from tests.cache.test_memory import reachable_tensors
from tests.pipelines.words import text
from tests.presses.matrix import CONTEXT_TOKENS, catalogue, make, missing, model_of, ours, refused, theirs
from tests.presses.reading import lossless
from tests.tiny_models import prompt
from tests.versions import kvpress_names

NAMES = list(catalogue.CATALOGUE)
WORKING = [name for name, entry in catalogue.CATALOGUE.items() if entry.kind != catalogue.BASE]
STACKING = [name for name in NAMES if not refused(name)]
REFUSED = {
    "BasePress": "BasePress has no compress of its own and cannot evict anything; give a press that has",
    "CAMPress": "CAMPress merges values while decoding.*a second time; use it without TurboQuant, or Deco",
    "ScorerPress": "ScorerPress has no score of its own and cannot evict anything",
}
UNPRESSED = "KnormPress"  # whose model stands for all that have no adapter


def test_every_press_is_classified() -> None:
    """A press that a new kvpress exports has to be added to docs/catalogue.py."""
    assert set(catalogue.exported()) == set(NAMES)
    for name, press_class in catalogue.exported().items():
        assert missing(name) or type(make(name)) is press_class


def test_refused_are_those_named_here() -> None:
    assert {name for name in NAMES if refused(name)} == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    with pytest.raises(CompositionError, match=REFUSED[name]):
        Compose([make(name), TurboQuant()])


@functools.cache
def answer_of_kvpress(name: str) -> str:
    return theirs(name, make(name))


@functools.cache
def answer_without_a_press(attention: str, one_token: bool) -> str:
    """Of the model and the question that presses of a kind are tested with."""
    entries = catalogue.CATALOGUE.items()
    name = next(name for name, one in entries if (one.attention, one.one_token) == (attention, one_token))
    return theirs(name, None)


@pytest.mark.parametrize("name", WORKING)
def test_alone(name: str) -> None:
    """In our pipeline a press answers as in kvpress's own."""
    assert ours(name, make(name)) == answer_of_kvpress(name)


@pytest.mark.parametrize("name", STACKING)
def test_before_a_lossless_codec(name: str) -> None:
    expected, entry = answer_of_kvpress(name), catalogue.CATALOGUE[name]
    assert expected != answer_without_a_press(entry.attention, entry.one_token), (
        "the press changes nothing here: the comparison would prove nothing"
    )
    cache = DynamicCache()
    assert ours(name, Compose([make(name), lossless()]), cache=cache) == expected
    assert all(isinstance(layer, PackedLayer) and layer.packed_tokens for layer in cache.layers)


@pytest.mark.parametrize("name", STACKING)
def test_resident_bytes(name: str) -> None:
    """Codes and scales of whole pages, the model's own numbers for the rest, and little else."""
    recent, sinks, bits = 16, 4, 4
    model, quantizer = model_of(name), TurboQuant(bits, recent_tokens=recent, sink_tokens=sinks)
    plain, hidden = prefilled(model, make(name))
    cache, evicted = prefilled(model, Compose([make(name), quantizer]))
    assert evicted.keys() == hidden.keys()
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    assert quantizer.bits_per_value(dim) == bits + 16 / dim
    per_packed = 2 * dim * quantizer.bits_per_value(dim) / 8  # bytes of a token of a head
    per_dense = 2 * dim * 4
    for index, (layer, before) in enumerate(zip(cache.layers, plain.layers, strict=True)):
        count = before.get_seq_length()
        assert layer.get_seq_length() == count
        found = reachable_tensors(vars(layer), {})
        walked = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
        promised, slack = 0.0, heads * 6 * per_dense  # the mean key, channel weights and what follows
        if index not in hidden:
            packed = (count - sinks - recent) // 128 * 128
            promised = heads * (packed * per_packed + (count - packed) * per_dense)
            assert packed > 0
        else:  # each head has the pages that its own tokens fill
            assert torch.equal(hidden[index], evicted[index])
            kept = count - hidden[index]
            packs = (kept - sinks - recent).clamp(min=0)
            promised = float(packs.sum()) * per_packed
            slack += heads * (127 * per_packed + (sinks + recent) * per_dense)  # the first page; the windows
            assert layer.packed_tokens >= packs.max() > 0
        assert promised <= walked <= promised + slack
    memory = cache_memory(cache)
    walk = reachable_tensors([vars(layer) for layer in cache.layers], {})
    assert memory.total_bytes == sum(tensor.untyped_storage().nbytes() for tensor in walk.values())


def prefilled(model: PreTrainedModel, press: Any) -> tuple[DynamicCache, dict[int, torch.Tensor]]:
    """A cache, and how many tokens each KV head [Hkv] of a layer hides, by layer."""
    ids = prompt(CONTEXT_TOKENS, seed=3)
    ids[ids == catalogue.DELIMITER_ID] = catalogue.DELIMITER_ID + 1
    ids[0, -catalogue.FINCH_WINDOW - 1] = catalogue.DELIMITER_ID
    cache = DynamicCache()
    with torch.no_grad(), kvpress_names(model, press), press(model):
        model.model(input_ids=ids, past_key_values=cache)
    hidden = {}
    for index, layer in enumerate(model.model.layers):
        named = vars(layer.self_attn).pop("masked_key_indices", None)
        if named is not None and len(named[0]):
            hidden[index] = torch.bincount(named[1].cpu(), minlength=model.config.num_key_value_heads)
        layer.self_attn._modules.pop("rotary_emb", None)
    vars(model.model).pop("forward", None)
    return cache, hidden


def snap(ratio: float = 0.3) -> SnapKV:
    return SnapKV(ratio, window_size=16)


# Those that kvpress's ComposedPress takes are compared with it, the others with the same without a quantizer.
CHAINS = {
    "SnapKV, Knorm": lambda: [snap(), Knorm(0.3)],
    "StreamingLLM, KeyDiff": lambda: [StreamingLLM(0.3), KeyDiff(0.3)],
    "SnapKV, ThinK": lambda: [snap(0.5), ThinK(0.5)],
    "ThinK, SnapKV": lambda: [ThinK(0.5), snap(0.5)],
    "ExpectedAttention, LagKV, Knorm": lambda: [ExpectedAttention(0.2), LagKV(0.2, lag_size=16), Knorm(0.2)],
    "Merging, ThinK": lambda: [Merging(snap(0.5)), ThinK(0.5)],
    "ChunkKV, CriticalKV": lambda: [ChunkKV(snap()), CriticalKV(Knorm(0.3))],
}
NOT_IN_KVPRESS = {
    "SnapKV, AdaKV": lambda: [snap(), AdaKV(Knorm(0.3))],
    "ThinK, AdaKV": lambda: [ThinK(0.5), AdaKV(snap(0.5))],
    "StreamingLLM, DuoAttention": lambda: [StreamingLLM(0.3), make("DuoAttentionPress")],
    "KeyRerotation, ThinK": lambda: [KeyRerotation(StreamingLLM(0.5)), ThinK(0.5)],
    "Knorm, KeyRerotation": lambda: [Knorm(0.3), KeyRerotation(StreamingLLM(0.3))],
    "KeyRerotation, AdaKV": lambda: [KeyRerotation(Knorm(0.3)), AdaKV(Knorm(0.3))],
    "Knorm, PyramidKV": lambda: [Knorm(0.2), PyramidKV(0.3, window_size=8, beta=2)],
    "PerLayerCompression, ThinK": lambda: [PerLayerCompression(Knorm(0), [0.3, 0.4, 0.5]), ThinK(0.5)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_that_kvpress_knows(name: str) -> None:
    expected = theirs(UNPRESSED, kvpress.ComposedPress(CHAINS[name]()))
    assert expected != theirs(UNPRESSED, None)
    assert ours(UNPRESSED, Compose([*CHAINS[name](), lossless()])) == expected


def test_prefill_decoding_without_a_decoding_press() -> None:
    """Then it is its prefilling press."""
    expected = theirs(UNPRESSED, kvpress.PrefillDecodingPress(snap(0.5)))
    assert expected != theirs(UNPRESSED, None)
    composed = Compose([kvpress.PrefillDecodingPress(snap(0.5)), lossless()])
    assert composed.compression_ratio == 0.5
    assert ours(UNPRESSED, composed) == expected


@pytest.mark.parametrize("name", NOT_IN_KVPRESS)
def test_chains_that_only_work_here(name: str) -> None:
    expected = ours(UNPRESSED, Compose(NOT_IN_KVPRESS[name]()))
    assert expected != ours(UNPRESSED, None)
    cache = DynamicCache()
    assert ours(UNPRESSED, Compose([*NOT_IN_KVPRESS[name](), lossless()]), cache=cache) == expected
    assert all(layer.packed_tokens for layer in cache.layers)


# One of each kind.
PARTNERS = ["SnapKVPress", "KeyRerotationPress", "ThinKPress", "AdaKVPress", "PyramidKVPress", "KVzipPress"]
SCORERS = [
    name
    for name in STACKING
    if catalogue.CATALOGUE[name].kind == catalogue.EVICTS
    and issubclass(catalogue.exported()[name], kvpress.ScorerPress)
    and name not in PARTNERS
]
OTHERS = [name for name in STACKING if name not in (*SCORERS, *PARTNERS, "RestoreKVPress")]


def partners_of(name: str) -> list[str]:
    """All for one of each kind, half of them for those that do more than score, one for those that score."""
    if name in SCORERS:
        return [PARTNERS[SCORERS.index(name) % len(PARTNERS)]]
    if name in PARTNERS:  # those before it have met it
        return PARTNERS[PARTNERS.index(name) :]
    return PARTNERS[OTHERS.index(name) % 2 :: 2]


@pytest.mark.parametrize("way", [Compose, lambda chain: kvpress.PrefillDecodingPress(Compose(chain))])
def test_eager_attention_returns_no_weights_of_evicted_tokens(way: Any) -> None:
    """kvpress fails there: SnapKV takes the weights of the whole context where eager attention has some."""
    name = "ObservedAttentionPress"
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        theirs(name, kvpress.ComposedPress([kvpress.KnormPress(0.3), snap(0.3)]))
    expected = ours(UNPRESSED, Compose([Knorm(0.3), snap(0.3)]))
    assert ours(name, way([Knorm(0.3), snap(0.3)])) == expected
    assert ours(name, way([Knorm(0.3), snap(0.3), lossless()])) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in STACKING if name != "RestoreKVPress"])
def test_pairs_work_or_are_refused(name: str) -> None:
    """A pair that Compose takes reads and answers, with a lossless codec as without one."""
    question = {"questions": [""], "max_new_tokens": 2}
    for partner in partners_of(name):
        for pair in dict.fromkeys(((name, partner), (partner, name))):
            try:
                Compose([*map(make, pair), TurboQuant()])
            except CompositionError:
                continue
            if {"ObservedAttentionPress", "AdaKVPress", "KVzipPress"}.issuperset(pair):
                continue  # the one needs eager attention, and kvpress's others refuse it
            packed = ours(name, Compose([*map(make, pair), lossless()]), **question)
            try:
                assert ours(name, Compose(list(map(make, pair))), **question) == packed, pair
            except ValueError as error:
                assert "Could not find fake keys" in str(error), pair  # kvpress's way of hiding


@pytest.mark.parametrize("press", [KVzip, AdaKV])
def test_no_fake_keys_are_needed(press: Any) -> None:
    """kvpress looks for one key that no query of a question attends to, and does not find it here."""
    question = {"questions": [text(90, seed=4)]}
    with pytest.raises(ValueError, match="Could not find fake keys"):
        theirs(UNPRESSED, press(0.5) if press is KVzip else press(snap(0.5)), **question)
    composed = Compose([press(0.5) if press is KVzip else press(snap(0.5)), lossless()])
    assert ours(UNPRESSED, composed, **question)


@pytest.mark.parametrize("name", [*CHAINS, *NOT_IN_KVPRESS])
def test_chains_with_real_codes(name: str) -> None:
    cache = DynamicCache()
    chain = {**CHAINS, **NOT_IN_KVPRESS}[name]()
    answer = ours(UNPRESSED, Compose([*chain, TurboQuant(4, recent_tokens=16)]), cache=cache)
    assert len(answer.split()) > 3
    memory = cache_memory(cache)
    assert all(layer.packed_tokens for layer in memory.layers)
    assert memory.total_bytes < 0.75 * memory.uncompressed_bytes
