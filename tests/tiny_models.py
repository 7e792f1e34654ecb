"""Tiny random models of the families that the suite covers.

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
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

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


@functools.cache
def tiny_model(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A float32 model in evaluation mode, the same object for the same arguments."""
    config_class, changes = _CONFIGS[family]
    config: AutoConfig = config_class(**{**_COMMON, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """[batch, tokens] int64 random ids without padding."""
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
