"""Positions under scaled rotary embeddings: what transformers and kvpress read is not refused."""

import copy
from typing import Any

import pytest
import torch
from kvpress import KVPressTextGenerationPipeline
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from quantpress.errors import ContextTooLongError
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses.models.attention import attention_modules, is_sliding
from quantpress.presses.models.positions import position_count
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import _COMMON

BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64, **BANDS},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_model_reads_what_kvpress_reads(name: str) -> None:
    config = LlamaConfig(**{**_COMMON, "max_position_embeddings": 64, "rope_parameters": SCALINGS[name]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    again = copy.deepcopy(model)  # dynamic scaling may leave the longest text on the model
    asked = {"question": "w1", "max_new_tokens": 4}
    pipe = TextGenerationPipeline(model=model, tokenizer=word_tokenizer())
    theirs = KVPressTextGenerationPipeline(model=again, tokenizer=word_tokenizer())
    assert pipe(text(200), **asked) == theirs(text(200), **asked)
    with pytest.raises(ContextTooLongError, match="the model has 256 positions"):
        pipe(text(300), **asked)


def llama3(factor: float, length: int) -> PreTrainedConfig:
    scaling = {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": 8192, **BANDS}
    return LlamaConfig(max_position_embeddings=length, rope_parameters=scaling)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PUBLISHED = {  # the lengths that the model cards give
    "Qwen3-8B with YaRN, 131072": (Qwen3Config(max_position_embeddings=40960, rope_parameters=YARN), 131072),
    "Llama 3.1, 131072": (llama3(8.0, 131072), 131072),
    "Llama 3.2, 131072": (llama3(32.0, 131072), 131072),
    "gpt-oss, 131072": (GptOssConfig(), 131072),
    "Gemma 3, 131072": (
        Gemma3TextConfig(
            max_position_embeddings=131072,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        131072,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str) -> None:
    config, expected = PUBLISHED[name]
    assert position_count(config) == expected


def test_scalings_by_layer_type() -> None:
    """The layers that see the whole context decide."""
    config = Gemma3TextConfig(max_position_embeddings=32768)
    config.rope_parameters["full_attention"] = YARN
    assert position_count(config) == 131072


def test_a_window_of_every_written_position_slides_once_positions_are_scaled() -> None:
    common = {**_COMMON, "max_position_embeddings": 64, "head_dim": 32}
    for scaling, slides in ((None, False), (SCALINGS["yarn"], True)):
        config = MistralConfig(**common, sliding_window=64, rope_parameters=scaling)
        model = AutoModelForCausalLM.from_config(config)
        assert [is_sliding(module) for module in attention_modules(model)] == [slides] * 3
