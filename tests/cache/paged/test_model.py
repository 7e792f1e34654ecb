"""A transformers model over paged attention: sequences of different lengths decode in one batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache import PagedAttention
from quantpress.codecs.raw import RawPages
from tests.tiny_models import HEAD_DIM, prompt, tiny_model

NAME = "paged_in_a_test"


@contextmanager
def attending(model: PreTrainedModel, paged: PagedAttention, sequences: list[int]) -> Iterator[None]:
    """The model's layers write to pages and read from them; `extend` has already counted the new tokens."""
    plan = paged.plan(sequences)

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        paged.write(key, value, plan, layer=module.layer_idx)
        output = paged.attend(query, plan, layer=module.layer_idx, scaling=options["scaling"])
        return output.transpose(1, 2), None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = attention
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NAME]


def next_tokens(
    model: PreTrainedModel, paged: PagedAttention, sequences: list[int], tokens: torch.Tensor
) -> torch.Tensor:
    """Greedy tokens [B] after `tokens` [B] of sequences of any length, in one forward pass."""
    positions = torch.tensor([[paged.length(sequence)] for sequence in sequences])
    paged.extend(sequences)
    with torch.inference_mode(), attending(model, paged, sequences):
        logits = model(input_ids=tokens[:, None], position_ids=positions, use_cache=False).logits
    return logits[:, -1].argmax(-1)


def alone(model: PreTrainedModel, ids: torch.Tensor, new: int) -> list[int]:
    """The answer of the model to one prompt alone."""
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return found[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "multi_query", "multi_head"])
def test_a_batch_of_sequences_says_what_each_says_alone(family: str) -> None:
    """Sequences join, share a prefix and leave while others go on; nothing but the storage differs."""
    model = tiny_model(family)
    codec = RawPages(HEAD_DIM, 32)
    paged = PagedAttention(
        12,
        4,
        query_heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        head_dim=HEAD_DIM,
        layers=3,
        recent_tokens=8,
        codecs=(codec, codec),
        dtype=torch.float32,
    )
    said: dict[int, list[int]] = {}
    asked: dict[int, torch.Tensor] = {}

    def join(ids: torch.Tensor) -> int:
        cache = DynamicCache()
        with torch.inference_mode():
            logits = model(ids, past_key_values=cache).logits
        states = [torch.cat([getattr(layer, side) for layer in cache.layers]) for side in ("keys", "values")]
        sequence = paged.add(*states)
        said[sequence], asked[sequence] = [int(logits[0, -1].argmax())], ids
        return sequence

    def decode(steps: int, sequences: list[int]) -> None:
        for _ in range(steps):
            tokens = next_tokens(model, paged, sequences, torch.tensor([said[s][-1] for s in sequences]))
            for sequence, token in zip(sequences, tokens.tolist(), strict=True):
                said[sequence].append(token)

    def leave(sequence: int) -> None:
        paged.free(sequence)
        assert said[sequence] == alone(model, asked.pop(sequence), len(said[sequence]))
        assert len(set(said.pop(sequence))) > 5

    first, second = join(prompt(150, seed=1)), join(prompt(30, seed=2))
    decode(12, [second, first])  # the first one packs a page
    copy = paged.fork(first)
    said[copy], asked[copy] = list(said[first]), asked[first]
    third = join(prompt(300, seed=3))
    decode(4, [third, first, second])
    leave(first)
    decode(10, [copy, second, third])
    fourth = join(prompt(141, seed=4))  # replaces the first
    decode(20, [fourth, copy, third, second])
    for sequence in (second, third, copy, fourth):
        leave(sequence)
    assert paged.free_blocks == 12
