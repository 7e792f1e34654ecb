"""Tiny random models: `FAMILIES`, which the whole suite covers, and others for single tests.

Their weights are drawn wide, so that greedy tokens change when the cache is off by a little: a test that
compares tokens on a model that always says the same thing proves nothing (`test_tokens_depend_on_the_cache`
holds that).
"""

import functools
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.hybrid_models import HYBRID

VOCABULARY = 256
HEAD_DIM = 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None, "head_dim": HEAD_DIM}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": HEAD_DIM}),
    "phi3": (Phi3Config, {}),
    "gemma3": (
        Gemma3TextConfig,
        {
            "head_dim": HEAD_DIM,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "query_pre_attn_scalar": HEAD_DIM,
        },
    ),
}
FAMILIES = tuple(_CONFIGS)

_SLIDING = {
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
_LATENT = {  # keys of 32 channels, values of 16
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 3,
}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_OTHERS: dict[str, tuple[type, dict[str, Any]]] = {
    # Sliding-window layers beside full ones; all of them sliding.
    "gemma2": (Gemma2Config, {"head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, **_SLIDING}),
    "gpt_oss": (GptOssConfig, {"head_dim": HEAD_DIM, **_EXPERTS, **_SLIDING}),
    "qwen2_sliding": (Qwen2Config, {"use_sliding_window": True, **_SLIDING}),
    "qwen3_sliding": (Qwen3Config, {"head_dim": HEAD_DIM, "use_sliding_window": True, **_SLIDING}),
    "mistral_sliding": (MistralConfig, {"head_dim": HEAD_DIM, "sliding_window": 64}),
    "mistral_wide": (
        MistralConfig,
        {"head_dim": HEAD_DIM, "sliding_window": 8192},
    ),  # wider than all positions
    # Heads: one KV head for all, as many as query heads, keys and values of different head_dim.
    "multi_query": (LlamaConfig, {"num_key_value_heads": 1}),
    "multi_head": (LlamaConfig, {"num_key_value_heads": 4}),
    "deepseek_v2": (DeepseekV2Config, {**_LATENT, "head_dim": 16}),
    "deepseek_v3": (DeepseekV3Config, _LATENT),
    # Another way to rotate, no rotation, another place for attention.
    "phi": (PhiConfig, {}),
    "gpt2": (GPT2Config, {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 4096}),
    "gpt_neox": (GPTNeoXConfig, {}),
    # Attention that does not go through transformers' table of functions.
    "bloom": (BloomConfig, {"n_head": 4, "n_layer": 3}),
    "nemotron": (NemotronConfig, {}),
}
_CONFIGS.update(_OTHERS)
_CONFIGS.update(HYBRID)
MODELS = frozenset(_CONFIGS)
"""The names that `tiny_model` takes."""


@functools.cache
def tiny_model(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode, the same object for the same arguments."""
    config_class, changes = _CONFIGS[family]
    config: AutoConfig = config_class(**{**_COMMON, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if attention == "sdpa" and family == "gemma2" and not Gemma2ForCausalLM._supports_sdpa:
            attention = "eager"
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """[batch, tokens] int64 random ids without padding."""
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
