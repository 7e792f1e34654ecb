"""Statistics of keys in the engine: those of a profile, or those of the first long piece of a prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from quantpress.cache import ModelProfile
from quantpress.errors import CacheFileError
from tests.engines.vllm.engine.poison import layers
from tests.engines.vllm.engine.running import Engine, engine
from tests.engines.vllm.engine.tiny import Truth, save_model, tokens

CLOSE = 0.15  # nats; other tokens in the cache give 0.9 or more
QUERY_HEADS = 16
PACKED = {"kv_cache_dtype": "quantpress_4bit"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers do not depend on the last bits of its keys."""
    return save_model(tmp_path_factory.mktemp("calm"), seed=2, initializer_range=0.05)


@pytest.fixture(scope="module")
def truth(folder: Path) -> Truth:
    return Truth(folder)


def profile_of(folder: Path, home: Path) -> str:
    from quantpress.pipelines.calibration import calibrate

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = {"random": " ".join(f"t{token}" for token in tokens(1500))}
    profile = calibrate(model, AutoTokenizer.from_pretrained(folder), texts, piece_tokens=500, progress=False)
    profile.save(home / "profile.safetensors")
    return str(home / "profile.safetensors")


def with_profile(path: str) -> dict[str, Any]:
    return PACKED | {"additional_config": {"quantpress": {"profile": path}}}


def stores(running: Engine) -> list[Any]:
    return [layer.impl.store for layer in layers(running.config)]


def test_each_layer_has_the_statistics_of_the_profile(folder: Path, truth: Truth, tmp_path: Path) -> None:
    path = profile_of(folder, tmp_path)
    profile = ModelProfile.load(path)
    with engine(folder, **with_profile(path), max_num_batched_tokens=2048, max_model_len=2048) as running:
        for prompt in (tokens(300), tokens(1400)):  # the second would give statistics of its own
            (answer,) = running.generate(prompt, new=20)
            assert truth.error(prompt, answer) < CLOSE
        for index, store in enumerate(stores(running)):
            expected = profile.transform(index)
            assert store.ready
            assert torch.equal(store.mean, expected.mean) and torch.equal(store.weight, expected.weight)


def test_without_a_profile_a_long_piece_gives_them(folder: Path, truth: Truth) -> None:
    """What was packed before is packed again, and read by requests that share it."""
    with engine(folder, **PACKED, max_num_batched_tokens=1100, max_model_len=2048) as running:
        short, long = tokens(400), tokens(1500)
        running.generate(short)
        running.generate(tokens(1023))
        assert not any(store.ready or store.mean.any() for store in stores(running))
        (answer,) = running.generate(long)
        assert all(store.ready and store.mean.any() for store in stores(running))
        means = [store.mean.clone() for store in stores(running)]
        assert truth.error(long, answer) < CLOSE
        for prompt, reused in [(short, 384), (long, 1408), (tokens(1500), 0)]:
            (answer,) = running.generate(prompt, new=20)
            assert truth.error(prompt, answer) < CLOSE and answer.num_cached_tokens == reused
        assert all(torch.equal(store.mean, mean) for store, mean in zip(stores(running), means, strict=True))


def test_the_profile_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", seed=1, num_hidden_layers=3)
    path = profile_of(other, tmp_path)
    with (
        pytest.raises(CacheFileError, match="num_hidden_layers was 3, is 2; run `quantpress calibrate"),
        engine(folder, **with_profile(path)),
    ):
        pass


def test_a_profile_that_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(CacheFileError, match=r"nowhere\.safetensors"),
        engine(folder, **with_profile(str(tmp_path / "nowhere.safetensors"))),
    ):
        pass


@pytest.mark.parametrize(
    ("total", "ranks", "own"),
    [
        (8, 1, [range(8)]),
        (8, 4, [range(2 * rank, 2 * rank + 2) for rank in range(4)]),
        (4, 4, [range(rank, rank + 1) for rank in range(4)]),
        (2, 4, [range(1), range(1), range(1, 2), range(1, 2)]),  # each head on two ranks
        (1, 4, [range(1)] * 4),
    ],
)
def test_heads_of_a_rank(total: int, ranks: int, own: list[range], monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's own layers divide the weights of keys."""
    from quantpress.engines.vllm import backend

    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_total_num_kv_heads=lambda: total),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )
    for rank, heads in enumerate(own):
        monkeypatch.setattr(backend, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert range(total)[backend._own_heads(config, max(1, total // ranks))] == heads
        whole, local = QUERY_HEADS // total, QUERY_HEADS // ranks // len(heads)  # query heads of a KV head
        group = range(whole)[backend._own_group(config, local)]
        queries = [head * whole + query for head in heads for query in group]
        assert queries == list(range(QUERY_HEADS // ranks * rank, QUERY_HEADS // ranks * (rank + 1)))
