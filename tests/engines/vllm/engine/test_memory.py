"""How many tokens fit, and what happens where they do not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantpress.evaluation.sizing.engine_plan import EngineAsked, engine_plans
from quantpress.evaluation.sizing.model_outline import outline
from tests.engines.vllm.engine.lossless import codecs_by_width
from tests.engines.vllm.engine.poison import layers
from tests.engines.vllm.engine.running import BLOCK, CHUNK, OPTIONS, Engine, engine
from tests.engines.vllm.engine.tiny import CONFIG, Truth, save_model, tokens, with_plan

HEAD_DIM, LAYERS, HEADS = CONFIG["head_dim"], CONFIG["num_hidden_layers"], CONFIG["num_key_value_heads"]
MEMORY = OPTIONS["kv_cache_memory_bytes"]


def block_bytes(keys: int, values: int, head_dim: int) -> int:
    """Of one layer: codes, a scale of two bytes for each vector, and two keys of a page in 16 bits.

    vLLM counts whole bytes a token: 64 bytes of a page are empty where head_dim is no multiple of 32.
    """
    own = BLOCK * ((keys + values) * head_dim // 8 + 4) + 2 * 2 * head_dim
    return HEADS * (own + -own % BLOCK)


@pytest.mark.parametrize(
    ("dtype", "bits", "dim"),
    [("quantpress_4bit", (4, 4), 64), ("quantpress_3bit", (3, 3), 96), ("quantpress_k4v2", (4, 2), 80)],
)
def test_as_many_tokens_fit_as_the_bits_promise(
    dtype: str, bits: tuple[int, int], dim: int, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, seed=0, head_dim=dim)
    shape = f"layers={LAYERS},kv_heads={HEADS},head_dim={dim}"
    (_, planned) = engine_plans(outline(shape), (dtype,), EngineAsked(BLOCK, 1))
    assert planned.block_bytes == LAYERS * block_bytes(*bits, dim)
    with engine(folder, kv_cache_dtype=dtype) as running:
        blocks = running.config.cache_config.num_gpu_blocks
        assert blocks == MEMORY // (LAYERS * block_bytes(*bits, dim))
        prompts = [tokens(300), tokens(500)]
        for answer in running.generate(*prompts, new=40):
            assert len(set(answer.outputs[0].token_ids)) > 5


def test_requests_that_lost_their_blocks_begin_again(folder: Path, truth: Truth) -> None:
    with engine(folder, num_gpu_blocks_override=9) as running:
        prompts = [tokens(random.randrange(200, 255)) for _ in range(4)]
        for prompt, answer in zip(prompts, running.generate(*prompts, new=200), strict=True):
            truth.check(prompt, answer.outputs[0])
        assert running.preempted


def key_error(running: Engine, layer: int, keys: Tensor, blocks: list[int]) -> float:
    """Of the packed keys of some blocks of a layer, relative to its keys [Hkv, T, D]."""
    side = layers(running.config)[layer].impl.store.blocks[0]
    planes = {name: plane[:, blocks].unsqueeze(0) for name, plane in side.planes.items()}
    packed = side.codec.decode(planes, side.transform, torch.float32)[0]
    keys = keys[:, : packed.shape[1]]
    return float((packed - keys).norm() / keys.norm())


@pytest.mark.parametrize("dim", [80, 96])
def test_each_layer_has_the_widths_of_a_plan(dim: int, tmp_path: Path) -> None:
    """As many bytes as they promise, and packed keys as precise as their widths allow."""
    widths = {0: (2, 4), 1: (4, 4), 2: (3, 2)}
    shape = {"num_hidden_layers": 3, "head_dim": dim}
    folder = save_model(tmp_path / "model", seed=2, initializer_range=0.05, **shape)
    with engine(folder, kv_cache_dtype="quantpress_2bit", **with_plan(folder, tmp_path, widths)) as running:
        sizes = [layer.kv_cache[0].nbytes for layer in layers(running.config)]
        assert sizes == [block_bytes(*pair, dim) for pair in widths.values()]
        assert running.config.cache_config.num_gpu_blocks == MEMORY // sum(sizes)
        prompt = tokens(300)
        truth = Truth(folder)
        for reused in (0, 2 * BLOCK):
            (answer,) = running.generate(prompt, new=20)
            assert truth.error(prompt, answer) < 0.3  # nats; other tokens in the cache give 0.9 or more
            assert answer.num_cached_tokens == reused
        (blocks,) = running.steps[0].scheduled_new_reqs[0].block_ids
        cache = truth.model(torch.tensor([prompt])).past_key_values
        errors = [key_error(running, i, cache.layers[i].keys[0], blocks[:2]) for i in range(3)]
        assert 0.05 < errors[1] < 0.15 < errors[2] < 0.25 < errors[0] < 0.5, errors


@pytest.mark.parametrize("dim", [80, 192])
def test_nothing_is_lost_at_a_head_dim_that_is_no_power_of_two(dim: int, tmp_path: Path) -> None:
    """Pieces of prompts, blocks that decodes fill, prompts and decodes in one step, and prefixes."""
    folder = save_model(tmp_path, seed=0, head_dim=dim)
    truth = Truth(folder)
    with engine(folder) as running:
        first = tokens(2 * CHUNK + 55)
        prompts = [tokens(5), first, tokens(BLOCK - 3)]
        for prompt, answer in zip(prompts, running.generate(*prompts, new=20), strict=True):
            truth.check(prompt, answer.outputs[0])
        assert any(min(step) == 1 and max(step) > 1 for step in running.work()), "no step was mixed"
        longer = first[: 3 * BLOCK] + tokens(40)
        (answer,) = running.generate(longer)
        truth.check(longer, answer.outputs[0])
        assert answer.num_cached_tokens == 3 * BLOCK


def test_nothing_is_lost_where_layers_have_pages_of_their_own_size(
    folder: Path, truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefixes, preemption, more requests than slots, prompts and decodes in one step."""
    monkeypatch.setattr("quantpress.engines.vllm.backend.codecs_of", codecs_by_width)
    options = with_plan(folder, tmp_path, {0: (4, 2), 1: (2, 2)})
    with engine(folder, num_gpu_blocks_override=9, **options) as running:
        sizes = [layer.kv_cache[0].nbytes for layer in layers(running.config)]
        assert sizes == [HEADS * BLOCK * HEAD_DIM * of_vectors for of_vectors in (8 + 4, 4 + 4)]
        first = tokens(300)
        prompts = [first, *(tokens(random.randrange(200, 255)) for _ in range(4)), first[:256] + tokens(30)]
        for prompt, answer in zip(prompts, running.generate(*prompts, new=150), strict=True):
            truth.check(prompt, answer.outputs[0])
        assert running.preempted
        assert any(min(step) == 1 and max(step) > 1 for step in running.work()), "no step was mixed"
        for prompt in (first, first[:256] + tokens(60)):
            (answer,) = running.generate(prompt)
            truth.check(prompt, answer.outputs[0])
        assert answer.num_cached_tokens == 256
        core = running.llm.llm_engine.engine_core.engine_core
        (groups,) = core.model_executor.driver_worker.worker.model_runner.attn_groups
        planners = [group.get_metadata_builder()._planner for group in groups]
        assert len(planners) == 2 and planners[0] is planners[1], "a step is planned once"
