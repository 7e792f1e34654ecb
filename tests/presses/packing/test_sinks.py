"""Sinks found at the prefill: the right ones, stored in 16 bits, and nothing else changes."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantpress.cache import cache_memory
from quantpress.errors import CompositionError, InvalidInputError
from quantpress.presses import AdaKV, Compose, Knorm, KVzip, SnapKV, TurboQuant
from tests.presses.reading import answer, lossless, read
from tests.tiny_models import prompt, tiny_model

TOKENS = 420
IDS = prompt(TOKENS)
FIRST, COUNT = 4, 3


def attention(model: Any, layer: int) -> torch.Tensor:
    """[Hkv, T] attention of the last 64 queries, by transformers' own eager attention."""
    with torch.inference_mode():
        weights = model(IDS, output_attentions=True).attentions[layer][0]  # [Hq, T, T]
    heads = model.config.num_key_value_heads
    return weights[:, -64:].unflatten(0, (heads, -1)).mean(dim=(1, 2))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_tokens_with_most_attention_are_kept_exactly(family: str) -> None:
    model = tiny_model(family, "eager")
    press = TurboQuant(4, sink_tokens=FIRST, recent_tokens=64, detect_sinks=COUNT)
    plain, cache = read(model, None, IDS), read(model, press, IDS)
    for index, (layer, before) in enumerate(zip(cache.layers, plain.layers, strict=True)):
        sinks = layer.tokens.sinks.keys
        assert sinks.shape[2] == FIRST + COUNT and layer.get_seq_length() == TOKENS
        assert torch.equal(sinks[:, :, :FIRST], before.keys[:, :, :FIRST])
        assert torch.equal(layer.tokens.recent.keys[:, :, -64:], before.keys[:, :, -64:])
        candidates = attention(model, index)[:, FIRST : TOKENS - 64]
        for head in range(sinks.shape[1]):
            found = [int((before.keys[0, head] == key).all(-1).nonzero()) for key in sinks[0, head, FIRST:]]
            # Attention there is normalized over all tokens, here over the candidates: the ranks may differ
            # a little.
            best = (candidates[head].topk(4 * COUNT).indices + FIRST).tolist()
            assert set(found) <= set(best)


@pytest.mark.parametrize(
    "evictors",
    [[], [SnapKV(0.5)], [Knorm(0.5)], [AdaKV(Knorm(0.5))], [SnapKV(0.3), AdaKV(Knorm(0.3))]],
    ids=["none", "snapkv", "knorm", "adakv", "snapkv adakv"],
)
def test_order_of_storage_changes_no_answer(evictors: list[Any]) -> None:
    """Also where a head-wise press names slots: they move along."""
    model = tiny_model("llama")
    expected = answer(model, read(model, Compose([*evictors, lossless()]), IDS), TOKENS)
    cache = read(model, Compose([*evictors, lossless(detect_sinks=COUNT)]), IDS)
    assert cache.layers[0].tokens.sinks.tokens == 4 + COUNT
    assert answer(model, cache, TOKENS) == expected


def test_a_short_context_is_packed_without() -> None:
    cache = read(tiny_model("llama"), TurboQuant(detect_sinks=4), IDS[:, :200])
    assert cache.layers[0].tokens.sinks.tokens == 4


def test_refusals() -> None:
    with pytest.raises(InvalidInputError, match="detect_sinks is -1"):
        TurboQuant(detect_sinks=-1)
    with pytest.raises(CompositionError, match="KVzip acts after the prefill, where sinks are detected"):
        Compose([KVzip(0.5), TurboQuant(detect_sinks=4)])


def test_a_padded_batch_is_packed_without_and_told() -> None:
    model, ids = tiny_model("llama"), prompt(TOKENS, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    told, plain = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        with TurboQuant()(model):
            model.model(ids, attention_mask=mask, past_key_values=plain)
        with TurboQuant(detect_sinks=4)(model), pytest.warns(UserWarning, match="padded batch") as warned:
            model.model(ids, attention_mask=mask, past_key_values=told)
    assert len(warned) == 1 and told.layers[0].tokens.sinks.tokens == 4
    assert cache_memory(told) == cache_memory(plain) and told.layers[0].tokens.packed


def test_unknown_queries_are_told() -> None:
    model = tiny_model("gpt2")
    with (
        pytest.warns(UserWarning, match="packed without detected sinks"),
        TurboQuant(balance=False, recent_tokens=16, detect_sinks=4)(model),
    ):
        model.generate(IDS, max_new_tokens=2, do_sample=False)
