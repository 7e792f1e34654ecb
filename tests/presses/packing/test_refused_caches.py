"""Caches and contexts that cannot be packed are refused with what to do."""

from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from quantpress.errors import CompositionError, InvalidInputError, NonFiniteError
from quantpress.presses import Compose, Knorm, KVCompose, SnapKV, TurboQuant
from tests.presses.reading import lossless, read
from tests.tiny_models import prompt, tiny_model

IDS = prompt(420)


def test_cache_that_is_packed_already() -> None:
    model = tiny_model("llama")
    cache = read(model, TurboQuant(), IDS)
    cache.reset()
    with pytest.raises(InvalidInputError, match="layer 0 of the cache is packed already; pass a fresh"):
        read(model, TurboQuant(), IDS, cache)


def test_static_cache() -> None:
    model = tiny_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=512)
    with pytest.raises(InvalidInputError, match="StaticCache of StaticLayer cannot be packed; pass a fresh"):
        read(model, TurboQuant(), IDS, cache)


def test_cache_quantized_by_transformers() -> None:
    class Quantized(QuantizedLayer):
        def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return tensor

        def _dequantize(self, q_tensor: torch.Tensor) -> torch.Tensor:
            return q_tensor

    cache = DynamicCache()
    cache.layer_class_to_replicate = Quantized
    with pytest.raises(InvalidInputError, match="of Quantized cannot be packed"):
        read(tiny_model("llama"), TurboQuant(), IDS, cache)


@pytest.mark.parametrize(
    "press", [TurboQuant(), Compose([SnapKV(0.5), TurboQuant()])], ids=["alone", "composed"]
)
def test_cache_that_was_not_empty(press: Any) -> None:
    model = tiny_model("llama")
    cache = read(model, None, prompt(30))
    with (
        pytest.raises(InvalidInputError, match="held 30 tokens before this prefill of 420; pass a fresh"),
        press(model),
        torch.inference_mode(),
    ):
        model.model(input_ids=IDS, past_key_values=cache, cache_position=torch.arange(420))


@pytest.mark.parametrize("quantizer", [[], [TurboQuant()]], ids=["alone", "quantized"])
def test_generate_inside_the_context_of_a_press_that_acts_when_it_ends(quantizer: list[Any]) -> None:
    """kvpress's KVCompose leaves one token in each layer then."""
    model = tiny_model("llama")
    with (
        pytest.raises(CompositionError, match="KVCompose reads the context again and evicts when its `with`"),
        Compose([KVCompose(), *quantizer])(model),
    ):
        model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_eviction_from_a_padded_batch(attention: str) -> None:
    model, ids = tiny_model("llama", attention), prompt(100, batch=2)
    mask = torch.ones_like(ids)
    press = Compose([Knorm(0.5), TurboQuant()])
    with torch.inference_mode(), press(model):
        model.model(ids, attention_mask=mask, past_key_values=DynamicCache())
        mask[1, :10] = 0
        with pytest.raises(CompositionError, match="evicted 50 of 100 tokens from a padded batch"):
            model.model(ids, attention_mask=mask, past_key_values=DynamicCache())


@pytest.mark.parametrize(("side", "value"), [("k_proj", float("nan")), ("v_proj", float("inf"))])
def test_numbers_that_are_not_finite(side: str, value: float) -> None:
    model = tiny_model("llama", seed=77)
    weight = getattr(model.model.layers[1].self_attn, side).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = value
    try:
        name = "keys" if side == "k_proj" else "values"
        with pytest.raises(NonFiniteError, match=f"the {name} of layer 1 hold NaN or infinity"):
            read(model, TurboQuant(), IDS)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_press_that_changes_keys_after_the_quantizer() -> None:
    """kvpress's own composition does not check the order; the packed layer does."""
    with pytest.raises(InvalidInputError, match="must come before TurboQuant"):
        read(tiny_model("llama"), kvpress.ComposedPress([lossless(), kvpress.ThinKPress(0.5)]), IDS)


def test_a_press_that_only_evicts_after_the_quantizer() -> None:
    """Then codes move, as while decoding; sorted by the text, where kvpress leaves its top-k."""
    model, evictor = tiny_model("llama"), kvpress.KeyDiffPress(0.5)
    cache = read(model, kvpress.ComposedPress([lossless(), evictor]), IDS)
    plain = read(model, evictor, IDS)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert layer.packed_tokens >= 128 and layer.get_seq_length() == other.get_seq_length() == 210
        assert torch.equal((layer.keys + 0).sort(dim=2).values, other.keys.sort(dim=2).values)
        assert torch.equal((layer.values + 0).sort(dim=2).values, other.values.sort(dim=2).values)


def test_without_a_cache_there_is_nothing_to_do() -> None:
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="nothing can be compressed"), TurboQuant()(model):
        model.model(input_ids=IDS, use_cache=False)
