"""With a lossless codec a packed cache is DynamicCache: the same tokens in every way of generating."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache import PackedLayer
from quantpress.cache.attention.functions import model_eager_attention
from tests.cache.caches import lossless, packed_cache, scalar
from tests.tiny_models import FAMILIES, prompt, tiny_model

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beam": {"do_sample": False, "num_beams": 3},
    "beam_sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}
NEW_TOKENS = 24


def generate(model: PreTrainedModel, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(7)
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    tokens: torch.Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, **arguments)
    return tokens


# Every family, and every way of generating where layers are alike and where some slide.
CASES = [*((family, "greedy") for family in FAMILIES)]
CASES += [(family, way) for family in ("llama", "gemma3") for way in WAYS if way != "greedy"]


@pytest.mark.parametrize(("family", "way"), CASES)
def test_lossless_is_dynamic_cache(family: str, way: str) -> None:
    model, ids = tiny_model(family), prompt(300)
    cache = packed_cache(model, lossless(recent_tokens=16))
    expected = generate(model, ids, past_key_values=DynamicCache(config=model.config), **WAYS[way])
    assert torch.equal(generate(model, ids, past_key_values=cache, **WAYS[way]), expected)
    assert any(isinstance(layer, PackedLayer) and layer.packed_tokens >= 256 for layer in cache.layers)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tokens_depend_on_the_cache(attention: str) -> None:
    """The control of this file: at 1 bit the tokens must differ, or comparing tokens proves nothing."""
    model, ids = tiny_model("llama", attention), prompt(300)
    exact = generate(model, ids, past_key_values=DynamicCache())
    coarse = generate(model, ids, past_key_values=packed_cache(model, scalar(bits=1, recent_tokens=16)))
    assert not torch.equal(coarse, exact)


@pytest.mark.parametrize("wrapped", [True, False], ids=["packed_attention", "decoded_by_the_tensor"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attention_implementations(family: str, attention: str, wrapped: bool) -> None:
    model, ids = tiny_model(family, attention), prompt(300)
    expected = generate(model, ids, past_key_values=DynamicCache(config=model.config))
    stock = ALL_ATTENTION_FUNCTIONS.get(attention, model_eager_attention)
    cache = packed_cache(model, lossless(recent_tokens=16))
    ours = ALL_ATTENTION_FUNCTIONS[attention]
    ALL_ATTENTION_FUNCTIONS[attention] = ours if wrapped else stock
    try:
        assert torch.equal(generate(model, ids, past_key_values=cache), expected)
    finally:
        ALL_ATTENTION_FUNCTIONS[attention] = ours


@pytest.mark.parametrize("way", WAYS)
def test_left_padded_batch(way: str) -> None:
    model, ids = tiny_model("llama"), prompt(300, batch=3)
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    mask[2, :170] = 0
    ids = ids * mask
    expected = generate(model, ids, past_key_values=DynamicCache(), attention_mask=mask, **WAYS[way])
    cache = packed_cache(model, lossless(recent_tokens=16))
    assert torch.equal(
        generate(model, ids, past_key_values=cache, attention_mask=mask, **WAYS[way]), expected
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_prompt_lookup(family: str) -> None:
    model, ids = tiny_model(family), prompt(100).repeat(1, 3)
    expected = generate(model, ids, eos_token_id=0)
    cache = packed_cache(model, lossless(recent_tokens=16))
    got = generate(model, ids, past_key_values=cache, prompt_lookup_num_tokens=5, eos_token_id=0)
    assert torch.equal(got, expected)


def test_assisted_decoding() -> None:
    model, ids = tiny_model("llama"), prompt(300)
    assistant = copy.deepcopy(model)
    torch.manual_seed(3)
    for parameter in assistant.lm_head.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # agrees often, not always
    expected = generate(model, ids)
    cache = packed_cache(model, lossless(recent_tokens=16))
    assert torch.equal(generate(model, ids, past_key_values=cache, assistant_model=assistant), expected)


def test_attention_weights_on_request() -> None:
    model, ids = tiny_model("llama", "eager"), prompt(300)
    options = {"output_attentions": True, "return_dict_in_generate": True}
    expected = generate(model, ids, **options)
    got = generate(model, ids, past_key_values=packed_cache(model, lossless(recent_tokens=16)), **options)
    for one, other in zip(expected.attentions[-1], got.attentions[-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_logit_error_falls_with_bits() -> None:
    """Through a prefill, a multi-token continuation and flushes: each bit halves the codec error, so 8 bits
    are far below 4.
    """
    model, ids, more = tiny_model("llama"), prompt(300), prompt(200, seed=1)

    def last_logits(cache: DynamicCache) -> torch.Tensor:
        with torch.inference_mode():
            logits = [model(part, past_key_values=cache).logits for part in (ids, more, more[:, :1])]
        return logits[-1]

    exact = last_logits(DynamicCache())
    caches = {bits: packed_cache(model, scalar(bits=bits, recent_tokens=16)) for bits in (2, 4, 8)}
    error = {bits: float((last_logits(cache) - exact).std() / exact.std()) for bits, cache in caches.items()}
    assert all(cache.layers[0].packed_tokens == 384 for cache in caches.values())
    assert error[8] < 0.1
    assert error[8] < error[4] / 3 < error[2] / 3
