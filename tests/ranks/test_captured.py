"""Decode steps of processes that share a model over NCCL, captured with their collectives."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_second_gpu import NEW_TOKENS
from tests.ranks.test_ranks import linked, save_model, started

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU"),
]


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = linked(tmp_path_factory.mktemp("captured"))
    save_model(folder, "llama")
    started(folder, 2, Path(__file__).with_name("captured.py"))
    return [torch.load(folder / f"captured by {index}.pt") for index in range(2)]


@pytest.mark.parametrize("name", ["packed", "evicted"])
def test_steps_are_captured_with_their_collectives(name: str, each: list[dict[str, Any]]) -> None:
    for one in each:
        (ids, captures, replays), (expected, none, _) = one[name]
        assert ids == expected == each[0][name][0][0]
        assert captures and replays > NEW_TOKENS - 10 and not none


def test_steps_of_uneven_heads_are_not_captured(each: list[dict[str, Any]]) -> None:
    for one in each:
        (ids, captures, _), (expected, *_) = one["head_wise"]
        assert ids == expected and not captures
        assert one["head_wise, said"] and all(
            "heads keep different" in said for said in one["head_wise, said"]
        )


def test_an_enabled_model_captures_and_samples_the_same_in_both(each: list[dict[str, Any]]) -> None:
    """`cuda_graph=True` is an error where nothing is captured."""
    assert each[0]["enabled"] == each[1]["enabled"] and len(each[0]["enabled"]) == 740
