"""Continuing after an eviction: generate gets the positions that a hand-written loop would use."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from quantpress.cache import PackedLayer, continue_inputs, host
from quantpress.cache.continuation import inputs_after
from quantpress.errors import InvalidInputError
from tests.cache.caches import lossless, scalar
from tests.tiny_models import prompt, tiny_model

CONTEXT, KEPT = 400, 300


def evicted(model: PreTrainedModel, batch: int = 1) -> DynamicCache:
    """A cache that has read 400 tokens and keeps the last 300 of them."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(prompt(CONTEXT, batch), past_key_values=cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -KEPT:], layer.values[:, :, -KEPT:]
    return cache


def packed(cache: DynamicCache) -> DynamicCache:
    for index, layer in enumerate(cache.layers):
        cache.layers[index] = PackedLayer.from_states(
            layer.keys, layer.values, lossless(recent_tokens=16), tokens_seen=CONTEXT
        )
    return cache


def by_hand(model: PreTrainedModel, cache: DynamicCache, question: torch.Tensor, new: int) -> torch.Tensor:
    position, ids, tokens = CONTEXT, question, []
    with torch.inference_mode():
        for _ in range(new):
            positions = torch.arange(position, position + ids.shape[1]).expand(ids.shape)
            logits = model(ids, past_key_values=cache, position_ids=positions).logits
            position += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            tokens.append(ids)
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
def test_generate_after_eviction(pack: bool, batch: int) -> None:
    model, question = tiny_model("llama"), prompt(20, batch, seed=1)
    expected = by_hand(model, evicted(model, batch), question, 12)
    cache = packed(evicted(model, batch)) if pack else evicted(model, batch)
    inputs = continue_inputs(cache, question, tokens_seen=None if pack else CONTEXT)
    got = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(got[:, 20:], expected)


def test_wrong_positions_would_show() -> None:
    """The control: without the true token count the answer differs on this model."""
    model, question = tiny_model("llama"), prompt(20, seed=1)
    expected = by_hand(model, evicted(model), question, 12)
    cache = evicted(model)
    inputs = continue_inputs(cache, question)  # a plain cache does not know that it was evicted
    got = model.generate(**inputs, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert not torch.equal(got[:, 20:], expected)


def test_prompt_lookup_after_eviction() -> None:
    model, question = tiny_model("llama"), prompt(10, seed=1).repeat(1, 2)
    expected = by_hand(model, evicted(model), question, 12)
    cache = packed(evicted(model))
    history = prompt(CONTEXT)[:, -KEPT:]
    if host.feeds_again():
        with pytest.raises(InvalidInputError, match="feeds a filled cache its history again"):
            continue_inputs(cache, question, history=history)
        return
    inputs = continue_inputs(cache, question, history=history)
    got = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=12, prompt_lookup_num_tokens=3, eos_token_id=0
    )
    assert torch.equal(got[:, KEPT + 20 :], expected)


def test_tokens_seen_follows_the_cache() -> None:
    model, cache = tiny_model("llama"), packed(evicted(tiny_model("llama")))
    model.generate(
        **continue_inputs(cache, prompt(20)), past_key_values=cache, max_new_tokens=5, do_sample=False
    )
    assert [layer.tokens_seen for layer in cache.layers] == [CONTEXT + 24] * 3
    cache.crop(-4)
    assert int(continue_inputs(cache, prompt(1))["position_ids"]) == CONTEXT + 20


def test_bad_input() -> None:
    cache = DynamicCache()
    cache.layers.append(PackedLayer.from_states(*torch.randn(2, 1, 1, 50, 32), scalar()))
    with pytest.raises(InvalidInputError, match=r"input_ids has shape \(1, 0\)"):
        continue_inputs(cache, prompt(0))
    with pytest.raises(InvalidInputError, match="tokens_seen is 49, but the cache keeps 50"):
        continue_inputs(cache, prompt(3), tokens_seen=49)
    with pytest.raises(InvalidInputError, match=r"history has shape \(1, 7\)"):
        inputs_after(cache, prompt(3), history=prompt(7))
