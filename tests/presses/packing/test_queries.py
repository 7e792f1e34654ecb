"""Queries computed again from hidden states are those that attention was given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    GPTNeoXConfig,
    GptOssConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen3MoeConfig,
    StableLmConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache import PackedLayer, host
from quantpress.cache.attention.functions import model_eager_attention
from quantpress.presses import TurboQuant
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.models.old_names import old_names
from quantpress.presses.packing.prefill_hook import prefill_call
from quantpress.presses.packing.queries import UnknownAttentionError, query_moment, recomputed_keys
from tests.hybrid_models import HYBRID, WORKING
from tests.tiny_models import FAMILIES, prompt, tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 4}

OTHERS = {
    "partial rotation inside (Phi3)": (Phi3Config, {**GROUPED, "partial_rotary_factor": 0.5}),
    "partial rotation outside (StableLM)": (StableLmConfig, GROUPED),
    "norm of each head (Qwen3-MoE)": (
        Qwen3MoeConfig,
        {**GROUPED, **EXPERTS, "head_dim": 32},
    ),
    "norm of all heads (OLMo2)": (Olmo2Config, GROUPED),
    "norm with a weight per head (Cohere)": (CohereConfig, {**GROUPED, "use_qk_norm": True}),
    "half tables (gpt-oss)": (
        GptOssConfig,
        {
            **GROUPED,
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def build(config_class: Any, changes: dict[str, Any], attention: str = "sdpa") -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = config_class(**{**SIZES, **changes})
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@contextmanager
def seen_queries(into: list[torch.Tensor]) -> Iterator[None]:
    """Collect what eager attention is given, layer by layer."""

    def watching(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        into.append(query)
        return model_eager_attention(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["eager"] = watching
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]


def check_moments(model: PreTrainedModel, window: int = 16) -> None:
    queries: list[torch.Tensor] = []
    moments, keys = [], []

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call = prefill_call(module, args, kwargs)
        assert call is not None
        states = call.cache.layers[call.layer_idx].keys
        inputs = (module, call.hidden_states, call.position_embeddings)
        moments.append(query_moment(*inputs, states.shape[1], window, states))
        if not call.cache.layers[call.layer_idx].is_sliding:
            keys.append((recomputed_keys(*inputs), states))

    modules = attention_modules(model)
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        with old_names(model.model, modules), seen_queries(queries), torch.inference_mode():
            model.model(input_ids=prompt(50, batch=2), past_key_values=DynamicCache(config=model.config))
    finally:
        for handle in handles:
            handle.remove()
    assert len(queries) == len(moments) == len(modules)
    for query, moment in zip(queries, moments, strict=True):
        batch, heads, _, dim = query.shape
        expected = query[:, :, -window:].square().mean(2).view(batch, 2, heads // 2, dim).mean(2)
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-5)
    for computed, actual in keys:
        torch.testing.assert_close(computed, actual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_moment_of_the_covered_families(family: str) -> None:
    check_moments(tiny_model(family, "eager"))


@pytest.mark.skipif(not host.HOLDS_STATES, reason="caches of this transformers cannot hold states")
@pytest.mark.parametrize("family", [name for name in WORKING if name in HYBRID and name != "zaya"])
def test_moment_of_hybrid_families(family: str) -> None:
    """With a gate in the projection, without rotation, with norms of other names."""
    check_moments(tiny_model(family, "eager"))


@pytest.mark.parametrize("name", OTHERS)
def test_moment_of_other_attention_classes(name: str) -> None:
    check_moments(build(*OTHERS[name], attention="eager"))


def test_a_window_longer_than_the_context() -> None:
    check_moments(tiny_model("llama", "eager"), window=500)


def test_unknown_attention_is_packed_without_balance_and_said_once() -> None:
    model = build(GPTNeoXConfig, {})
    cache = DynamicCache()
    with (
        torch.inference_mode(),
        TurboQuant(recent_tokens=16)(model),
        pytest.warns(UserWarning, match="queries of GPTNeoXAttention are not known") as caught,
    ):
        model(prompt(300), past_key_values=cache)
    assert len([one for one in caught if "queries of" in str(one.message)]) == 1
    for layer in cache.layers:
        assert isinstance(layer, PackedLayer) and layer.tokens is not None
        assert layer.tokens.key_transform is not None
        assert layer.tokens.key_transform.weight is None and layer.tokens.key_transform.mean is not None


def test_keys_that_are_not_in_the_cache_are_noticed() -> None:
    """A class that projects like Llama but does more to its keys must not be balanced by wrong queries."""
    model = tiny_model("llama")
    module, hidden = model.model.layers[0].self_attn, torch.randn(1, 20, 128)
    tables = model.model.rotary_emb(hidden, torch.arange(20)[None])
    with torch.no_grad():
        keys = recomputed_keys(module, hidden, tables)
        assert query_moment(module, hidden, tables, 2, 256, keys).shape == (1, 2, 32)
        thinned = keys * (torch.arange(32) % 3 > 0)  # ThinK sets channels to zero
        assert query_moment(module, hidden, tables, 2, 256, thinned).shape == (1, 2, 32)
        for other in (keys * 1.1, keys.roll(1, dims=-1), torch.zeros_like(keys), keys[:, :1]):
            with pytest.raises(UnknownAttentionError):
                query_moment(module, hidden, tables, 2, 256, other)
        with pytest.raises(UnknownAttentionError, match="are not those in its cache"):
            query_moment(module, hidden, None, 2, 256, keys)
