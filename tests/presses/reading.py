"""Reads a context with a press and goes on greedily, as kvpress's pipeline does."""

from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from quantpress.codecs.raw import RawPages
from quantpress.presses import TurboQuant
from tests.tiny_models import prompt, tiny_model
from tests.versions import kvpress_names

QUESTION = prompt(3, seed=7)


def lossless(**options: Any) -> TurboQuant:
    """Packs into pages that keep every number, with windows so small that most tokens lie in pages."""
    windows = {"sink_tokens": 4, "recent_tokens": 16, **options}
    return TurboQuant(codec=lambda head_dim, role, layer_idx: RawPages(head_dim, 32), **windows)


def read(model: PreTrainedModel, press: Any, ids: torch.Tensor, cache: Any = None) -> DynamicCache:
    """The cache after a prefill of the backbone inside the press's context."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.inference_mode(), kvpress_names(model, press), press(model) if press else nullcontext():
        model.model(input_ids=ids, past_key_values=cache)
    return cache


def answer(model: PreTrainedModel, cache: DynamicCache, position: int, tokens: int = 12) -> list[int]:
    """Greedy tokens after `QUESTION`, whose first token stands at `position`."""
    ids, answered = QUESTION, []
    with torch.inference_mode():
        for _ in range(tokens):
            positions = torch.arange(position, position + ids.shape[1]).expand(ids.shape)
            logits = model(input_ids=ids, past_key_values=cache, position_ids=positions).logits
            position += ids.shape[1]
            ids = logits[:, -1:].argmax(-1)
            answered.append(int(ids))
    return answered


def multimodal_gemma3() -> PreTrainedModel:
    """The one class in which kvpress itself leaves sliding-window layers alone."""
    text = tiny_model("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        initializer_range=text["initializer_range"],
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma3ForConditionalGeneration(config).eval()
