"""On a CUDA device: saved contexts, a live patch, questions in view, the server's store, commands."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cli import loading
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.patching.live_patch import patch_attention
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Compose, SnapKV, TurboQuant
from tests.cli.test_serve import served_once
from tests.pipelines.words import model_folder, ours, text
from tests.tiny_models import prompt

pytestmark = pytest.mark.gpu

PRESSES = [TurboQuant(bits=4), Compose([SnapKV(0.5), TurboQuant(bits=3)])]
IDS = ["packed", "evicted"]
QUESTIONS = [text(5, seed=1), text(9, seed=2)]


def on_cuda(chat: bool = False) -> TextGenerationPipeline:
    pipe = ours(chat=chat)
    pipe.model = copy.deepcopy(pipe.model).cuda()
    pipe.device = pipe.model.device
    return pipe


@pytest.mark.parametrize("press", PRESSES, ids=IDS)
def test_a_loaded_context_answers_as_the_text_does(press: Any, tmp_path: Path) -> None:
    pipe, asked = on_cuda(), {"questions": QUESTIONS, "max_new_tokens": 150}
    expected = pipe(text(900), press=press, **asked)["answers"]
    context = pipe.read(text(900), press=press)
    assert pipe(context, **asked)["answers"] == expected
    context.save(tmp_path / "context.safetensors")
    loaded = CachedContext.load(tmp_path / "context.safetensors", pipe.model)
    assert loaded.memory == context.memory
    with loaded.opened(pipe.model) as cache:
        assert cache.layers[0].keys is None or cache.layers[0].keys.is_cuda
    for _ in range(2):
        assert pipe(loaded, **asked)["answers"] == expected


@pytest.mark.parametrize("press", PRESSES, ids=IDS)
def test_questions_in_view_are_answered_in_captured_steps(press: Any) -> None:
    pipe = on_cuda()
    asked = {"questions": QUESTIONS, "question_aware": True, "press": press, "max_new_tokens": 60}
    asked |= {"join_kernels": "exact"}
    answers = [pipe(text(900), cuda_graph=graph, **asked)["answers"] for graph in (False, None, True)]
    assert answers[1] == answers[2] == answers[0]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_live_patch(bits: int) -> None:
    """Against the same on the CPU: keys and values go through the kernels there and back."""
    ids, found = prompt(400), {}
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(ours().model).to(device)
        with torch.no_grad(), patch_attention(model, bits=bits) as patch:
            logits = model(ids.to(device)).logits.cpu()
        found[device] = logits, patch.record.calls
    (expected, on_cpu), (logits, on_gpu) = found["cpu"], found["cuda"]
    assert len(on_gpu) == len(on_cpu) > 0
    for here, there in zip(on_gpu, on_cpu, strict=True):
        assert here.packed_bytes == there.packed_bytes
        assert here.key_error == pytest.approx(there.key_error, rel=0.05)
        assert here.value_error == pytest.approx(there.value_error, rel=0.05)
    assert float((logits - expected).norm() / expected.norm()) < 0.05


def test_the_servers_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe = on_cuda(chat=True)
    options, contents = {"store": str(tmp_path / "store"), "store_bytes": "1GiB"}, [text(300), "w1"]
    found = [served_once(monkeypatch, contents, pipe=pipe, **options) for _ in range(2)]
    assert [said[1].partition(" new")[0] for said, _ in found] == [
        "305 tokens read, 6",
        "302 of 305 tokens from the store, 6",
    ]
    assert found[0][1] == found[1][1]


def test_bench(tmp_path: Path) -> None:
    options = [
        "--tokens",
        "600",
        "--new-tokens",
        "40",
        "--repeats",
        "1",
        "-m",
        model_folder(tmp_path),
        "--json",
    ]
    result = CliRunner().invoke(cli.app, ["bench", *options, "-p", "TurboQuant(4)"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["machine"]["device"].startswith("cuda")
    for row in found["presses"]:
        assert row["tokens_per_s"] > 0 and row["peak_bytes"] > 0


def test_device_auto(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pipe = loading.load_pipeline(model_folder(tmp_path), device="auto")
    assert pipe.model.device.type == "cuda"
    answers = [one(text(300), question="w1", press=PRESSES[0]) for one in (pipe, on_cuda())]
    assert answers[0] == answers[1]
