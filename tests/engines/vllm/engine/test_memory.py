"""How many tokens fit, and what happens where they do not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.engines.vllm.engine.running import BLOCK, OPTIONS, engine
from tests.engines.vllm.engine.tiny import CONFIG, Truth, tokens

HEAD_DIM, LAYERS, HEADS = CONFIG["head_dim"], CONFIG["num_hidden_layers"], CONFIG["num_key_value_heads"]


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("quantpress_4bit", (4, 4)), ("quantpress_3bit", (3, 3)), ("quantpress_k4v2", (4, 2))],
)
def test_as_many_tokens_fit_as_the_bits_promise(folder: Path, dtype: str, bits: tuple[int, int]) -> None:
    """Codes, a scale of two bytes for each vector, and two keys of a page in 16 bits."""
    vector = sum(width * HEAD_DIM // 8 + 2 for width in bits) + 2 * 2 * HEAD_DIM // BLOCK
    with engine(folder, kv_cache_dtype=dtype) as running:
        blocks = running.config.cache_config.num_gpu_blocks
        assert blocks == OPTIONS["kv_cache_memory_bytes"] // (LAYERS * HEADS * BLOCK * vector)
        prompts = [tokens(300), tokens(500)]
        for answer in running.generate(*prompts, new=40):
            assert len(set(answer.outputs[0].token_ids)) > 5


def test_requests_that_lost_their_blocks_begin_again(folder: Path, truth: Truth) -> None:
    with engine(folder, num_gpu_blocks_override=9) as running:
        prompts = [tokens(random.randrange(200, 255)) for _ in range(4)]
        for prompt, answer in zip(prompts, running.generate(*prompts, new=200), strict=True):
            truth.check(prompt, answer.outputs[0])
        assert running.preempted
