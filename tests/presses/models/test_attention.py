"""Which models are taken, and how the others are told."""

from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    DogeConfig,
    DynamicCache,
    LlamaModel,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from quantpress.cache import PackedLayer
from quantpress.errors import UnsupportedHeadDimError, UnsupportedModelError
from quantpress.presses import Compose, SnapKV, TurboQuant
from quantpress.presses.models.attention import (
    attention_modules,
    decoder_of,
    full_attention_modules,
    is_sliding,
)
from quantpress.presses.models.eligibility import EVICTABLE, HOOKABLE, LAYERED, PACKABLE, check, why_not
from tests.presses.reading import multimodal_gemma3
from tests.tiny_models import prompt, tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def build(config_class: Any, **changes: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config_class(**{**SIZES, **changes}))


UNSUPPORTED = {
    "MiniMax": (
        lambda: build(MiniMaxConfig, layer_types=["linear_attention", "full_attention"], num_local_experts=2),
        "keeps its state in a cache of its own kind, not in layers of a DynamicCache",
    ),
    "DiffLlama": (lambda: build(DiffLlamaConfig), "changes or shares keys and values"),
    "Doge": (lambda: build(DogeConfig), "DogeAttention changes or shares"),
    "Bloom": (
        lambda: build(BloomConfig, n_head=2, n_layer=2),
        "does not call attention through",
    ),
    "Mamba": (lambda: build(MambaConfig), "no decoder attention with a cache"),
    "T5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_ff=32, num_layers=1, num_heads=2)
        ),
        "encoder-decoder",
    ),
    "sliding only": (
        lambda: build(MistralConfig, sliding_window=64),
        "every layer of MistralForCausalLM is",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("press", [TurboQuant(), Compose([SnapKV, TurboQuant])], ids=["alone", "composed"])
def test_unsupported_models_are_refused_on_entering(name: str, press: Any) -> None:
    make, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match=message), press(make()):
        pytest.fail("entered")


CACHED_OTHERWISE = {  # of newer versions of transformers
    "DeepseekV4Config": "has layers of DeepseekV4HCACache, which hold more than keys and values",
    "DeepseekV32Config": "has layers of DynamicIndexedLayer, which hold more than keys and values",
    "InklingTextConfig": "adds a bias to scores that goes by cache slots",
    "Inkling2TextConfig": "adds a bias to scores that goes by cache slots",
}


@pytest.mark.parametrize("name", [name for name in CACHED_OTHERWISE if hasattr(transformers, name)])
def test_what_would_be_lost_is_refused(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(getattr(transformers, name)(num_hidden_layers=4))
    for rules in (PACKABLE, EVICTABLE):
        assert CACHED_OTHERWISE[name] in " ".join(why_not(model, rules))


def test_every_reason_is_given() -> None:
    model = UNSUPPORTED["MiniMax"][0]()
    model.config._attn_implementation_internal = "flex_attention"
    reasons = why_not(model, PACKABLE)
    assert [reason.partition(":")[0] for reason in reasons] == [
        "MiniMaxForCausalLM cannot be packed",
        "MiniMaxForCausalLM keeps its state in a cache of its own kind, not in layers of a DynamicCache",
    ]
    assert why_not(model, HOOKABLE) == why_not(model, LAYERED) == reasons[1:]
    assert not why_not(tiny_model("llama"), (*PACKABLE, *EVICTABLE))
    with pytest.raises(UnsupportedModelError, match="MiniMaxForCausalLM cannot be packed"):
        check(model, PACKABLE)


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa", "my_own"])
def test_attention_implementations(implementation: str) -> None:
    model = build(Qwen2Config)
    model.config._attn_implementation_internal = implementation
    with (
        pytest.raises(UnsupportedModelError, match='attn_implementation="sdpa"') as caught,
        TurboQuant()(model),
    ):
        pytest.fail("entered")
    assert repr(implementation) in str(caught.value)
    for supported in ("eager", "sdpa", "flash_attention_2", "flash_attention_3"):
        model.config._attn_implementation_internal = supported
        with TurboQuant()(model):
            pass


def test_head_dim_that_cannot_be_packed() -> None:
    with (
        pytest.raises(UnsupportedHeadDimError, match="head_dim 6 "),
        TurboQuant()(build(Qwen2Config, head_dim=6)),
    ):
        pytest.fail("entered")


def test_decoder_without_a_head() -> None:
    model = tiny_model("llama").model
    assert isinstance(model, LlamaModel)
    cache = DynamicCache()
    with torch.inference_mode(), TurboQuant(recent_tokens=16)(model):
        model(prompt(300), past_key_values=cache)
    assert all(isinstance(layer, PackedLayer) and layer.packed_tokens for layer in cache.layers)
    with pytest.raises(UnsupportedModelError, match="language-model head"), Compose([SnapKV])(model):
        pytest.fail("entered")


def test_where_attention_is() -> None:
    for model in (tiny_model("gemma3"), multimodal_gemma3()):
        modules = attention_modules(model)
        assert [module.layer_idx for module in modules] == [0, 1, 2]
        assert {type(module).__name__ for module in modules} == {"Gemma3Attention"}
        assert [is_sliding(module) for module in modules] == [True, False, False]
        assert full_attention_modules(model) == modules[1:]
        assert type(decoder_of(model)).__name__ == "Gemma3TextModel"


@pytest.mark.parametrize(
    ("config_class", "changes", "sliding"),
    [
        (MistralConfig, {"sliding_window": None}, [False, False]),
        (MistralConfig, {"sliding_window": 64}, [True, True]),
        (MistralConfig, {"sliding_window": 512}, [False, False]),
        (
            Qwen2Config,
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            [False, True],
        ),
        (Qwen2Config, {"use_sliding_window": False, "sliding_window": 64}, [False, False]),
    ],
    ids=["none", "window", "window of every position", "some layers", "switched off"],
)
def test_sliding_layers_are_told_by_the_config(config_class: Any, changes: Any, sliding: list[bool]) -> None:
    model = build(config_class, **changes)
    assert [is_sliding(module) for module in attention_modules(model)] == sliding
