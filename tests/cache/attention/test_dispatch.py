"""The dispatcher: what is wrapped, what is put back, and who sees what."""

import copy
import gc
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from quantpress.cache import PackedLayer, install_packed_attention, uninstall_packed_attention
from quantpress.cache.attention.causal import causal_mask
from quantpress.cache.attention.visibility import visibility
from quantpress.cache.saved.layers import cache_of, cache_parts
from quantpress.errors import UnsupportedModelError
from tests.cache.caches import functions, functions_left_alone, lossless
from tests.tiny_models import prompt, tiny_model

MODULE: Any = SimpleNamespace(is_causal=True)


def test_install_and_uninstall_leave_no_trace() -> None:
    """Either may be called again, and installing again puts the same objects in."""
    with functions_left_alone() as before:
        for _ in range(2):
            install_packed_attention()
            once = functions()
            install_packed_attention()
            assert functions() == once
            assert once["sdpa"] is not before["sdpa"] and "eager" in once
            for name in before.keys() & {"flex_attention", "paged|sdpa", "paged|eager"}:
                assert once[name] is before[name]
            uninstall_packed_attention()
            assert functions() == before
            uninstall_packed_attention()
            assert functions() == before
        install_packed_attention()
        assert functions() == once
        uninstall_packed_attention()


def test_attention_reads_packed_layers_as_long_as_there_are_any() -> None:
    """However a layer came to be; the last one that goes takes the wrappers along."""
    with functions_left_alone() as before:
        layers = [PackedLayer(lossless(recent_tokens=16))]
        wrapped = functions()
        assert wrapped["sdpa"] is not before["sdpa"]
        layers += [copy.copy(layers[0]), copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))]
        cache = DynamicCache()
        cache.layers.append(layers[0])
        layers += cache_of(cache_parts(cache)).layers
        del cache
        while layers:
            assert functions() == wrapped
            layers.pop(0)
        assert functions() == before


def test_an_unreachable_cycle_lets_go_when_it_is_collected() -> None:
    with functions_left_alone() as before:
        layer: Any = PackedLayer(lossless())
        layer.itself = layer
        wrapped = functions()
        del layer
        assert functions() == wrapped != before
        gc.collect()
        assert functions() == before


def test_explicit_installation_outlives_layers() -> None:
    with functions_left_alone() as before:
        layer = PackedLayer(lossless())
        install_packed_attention()
        wrapped = functions()
        del layer
        assert functions() == wrapped
        layer = PackedLayer(lossless())
        uninstall_packed_attention()
        assert functions() == wrapped
        del layer
        assert functions() == before


def test_unpacked_models_are_not_touched() -> None:
    """With the dispatcher in place a plain cache gives bit for bit what it gave without it."""
    for attention in ("sdpa", "eager"):
        model, ids = tiny_model("llama", attention), prompt(50)
        with torch.inference_mode():
            expected = model(ids, past_key_values=DynamicCache()).logits
            layer = PackedLayer(lossless())
            got = model(ids, past_key_values=DynamicCache()).logits
        del layer
        assert torch.equal(got, expected)


def test_gradients_flow_through_decoded_keys() -> None:
    """Where a gradient is wanted the original attention runs on decoded keys."""
    model, ids = tiny_model("llama"), prompt(300)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for index, layer in enumerate(cache.layers):
        cache.layers[index] = PackedLayer.from_states(layer.keys, layer.values, lossless(recent_tokens=16))
    embeds = torch.randn(1, 1, 128, requires_grad=True)
    model(inputs_embeds=embeds, past_key_values=cache).logits.square().mean().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


def test_causal_without_a_mask() -> None:
    seen = visibility(MODULE, 3, (1, 2, 10), None, {})
    assert seen.causal and seen.mask is None
    not_causal: Any = SimpleNamespace(is_causal=False)
    assert not visibility(not_causal, 3, (1, 2, 10), None, {}).causal
    assert not visibility(MODULE, 3, (1, 2, 10), None, {"is_causal": False}).causal


def test_flash_attention_padding_mask() -> None:
    padding = torch.ones(2, 12)
    padding[0, :5] = 0
    seen = visibility(MODULE, 3, (2, 2, 12), padding, {})
    assert seen.mask is not None
    expected = padding.bool()[:, None, None] & causal_mask(3, 12, None, torch.device("cpu"))
    assert torch.equal(seen.mask, expected)


def test_sliding_window_without_a_mask() -> None:
    seen = visibility(MODULE, 2, (1, 2, 6), None, {"sliding_window": 3})
    assert seen.mask is not None
    expected = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(seen.mask[0, 0], expected)


@pytest.mark.parametrize("additive", [False, True])
def test_causal_mask_of_another_layer(additive: bool) -> None:
    """A mask made for layer 0's length stands for the bottom-right causal one, if that is all it says."""
    mask = causal_mask(4, 20, None, torch.device("cpu"))[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    seen = visibility(MODULE, 4, (1, 2, 11), mask, {})
    assert seen.mask is None and seen.causal


def test_padded_mask_of_another_layer_is_refused() -> None:
    mask = causal_mask(4, 20, None, torch.device("cpu"))[None, None].clone()
    mask[..., :3] = False
    with pytest.raises(UnsupportedModelError, match="mask is for 20 tokens, this layer keeps 11"):
        visibility(MODULE, 4, (1, 2, 11), mask, {})


def test_head_wise_eviction_hides_entries() -> None:
    indices = (torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([3, 5]))
    module: Any = SimpleNamespace(is_causal=True, masked_key_indices=indices)
    dropped = visibility(module, 1, (1, 2, 8), None, {}).dropped
    assert dropped is not None
    assert dropped.nonzero().tolist() == [[0, 0, 3], [0, 1, 5]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_softcap_is_left_out_where_the_implementation_leaves_it_out(attention: str) -> None:
    """transformers' sdpa ignores Gemma 2's softcap: a packed layer does as the unpacked one, not better."""
    if attention == "sdpa" and not Gemma2ForCausalLM._supports_sdpa:
        pytest.skip("this transformers refuses Gemma 2 with sdpa")
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        attn_logit_softcapping=0.5,
        sliding_window=4096,
        layer_types=["full_attention"],
        initializer_range=0.4,
    )
    model = Gemma2ForCausalLM._from_config(config, attn_implementation=attention).eval()
    ids, plain, packed = prompt(300) % 64, DynamicCache(), DynamicCache()
    packed.layers.append(PackedLayer(lossless(recent_tokens=16)))
    with torch.inference_mode():
        for cache in (plain, packed):
            model(ids, past_key_values=cache)
        expected, got = (model(ids[:, :5], past_key_values=cache).logits for cache in (plain, packed))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
