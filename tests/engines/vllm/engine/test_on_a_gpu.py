"""What only a GPU has: CUDA graphs, vLLM's second model runner, and our kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.kernels import available
from tests.engines.vllm.engine.running import BLOCK, CHUNK, Engine, engine
from tests.engines.vllm.engine.test_speculation import DRAFTS, NEW, changed, drafts_of
from tests.engines.vllm.engine.tiny import Truth, save_model, tokens, with_plan

pytestmark = pytest.mark.gpu

FULL, PIECEWISE = "run_fullgraph", "run_pw_graph"
SPECULATION = {
    "method": "ngram",
    "num_speculative_tokens": DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


@pytest.fixture(scope="module")
def speculating(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Truth]]:
    """An engine with drafts, with graphs of decodes."""
    model = changed(folder, tmp_path_factory.mktemp("words"))
    sizes = [(1 + DRAFTS) * requests for requests in range(1, 5)] + [CHUNK]  # a piece of a prompt, too
    graphs: dict[str, Any] = {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": sizes,
    }
    with engine(model, speculative_config=SPECULATION, compilation_config=graphs) as running:
        yield running, Truth(model)


def test_drafts_in_graphs(speculating: tuple[Engine, Truth]) -> None:
    running, truth = speculating
    prompts = [tokens(20) * 5, tokens(BLOCK - 3), tokens(260), tokens(60) * 3]
    begin = len(running.steps)
    for prompt, answer in zip(prompts, running.generate(*prompts, new=NEW), strict=True):
        truth.check(prompt, answer.outputs[0])
    work = running.work(begin)
    assert sum(map(len, drafts_of(running))) > 0
    assert len(work) < NEW, "no draft was accepted"
    assert sum(map(sum, work)) > sum(map(len, prompts)) + (NEW - 1) * len(prompts), "none was rejected"
    assert FULL in running.replayed


@pytest.mark.parametrize("kind", ["compiled", "breakable"])
def test_pieces_of_prompts_in_graphs(
    kind: str, folder: Path, truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piecewise graphs: attention runs between them, over prompts and decodes in one step, too."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", str(int(kind == "breakable")))
    graphs: dict[str, Any] = {
        "mode": 3 if kind == "compiled" else 0,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "cudagraph_capture_sizes": [1, 2, 4, CHUNK],
    }
    with engine(folder, compilation_config=graphs) as running:
        prompts = [tokens(count) for count in (300, 5, 250)]
        for _ in range(2):  # and again from the prefix cache
            for prompt, answer in zip(prompts, running.generate(*prompts, new=BLOCK), strict=True):
                truth.check(prompt, answer.outputs[0])
        assert {FULL, PIECEWISE} <= set(running.replayed)
        assert any(min(step) == 1 and max(step) > 1 for step in running.work()), "no step was mixed"


WIDTHS = {0: (4, 3), 1: (2, 4)}
CASES = {
    "4 bits": ("quantpress_4bit", 128, None, 0.15),
    "2 bits": ("quantpress_2bit", 64, None, 0.6),
    "a plan": ("quantpress_3bit", 128, WIDTHS, 0.6),
    "80 channels": ("quantpress_4bit", 80, None, 0.15),
    "96 channels": ("quantpress_k4v3", 96, None, 0.3),
    "192 channels and a plan": ("quantpress_3bit", 192, WIDTHS, 0.6),
}
"""dtype, head_dim, widths of a plan, and nats by which answers over packed blocks may be off."""


@pytest.fixture(scope="module", params=CASES)
def packed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Truth]]:
    """An engine whose statistics of keys are there already."""
    dtype, dim, widths, _ = CASES[request.param]
    home = tmp_path_factory.mktemp("packed")
    model = save_model(home / "model", seed=2, head_dim=dim, initializer_range=0.05)
    options = {"kv_cache_dtype": dtype, "dtype": "bfloat16", "max_model_len": 2048}
    if widths is not None:
        options |= with_plan(model, home, widths)
    with engine(model, **options, max_num_batched_tokens=1200) as running:
        running.generate(tokens(1100))
        yield running, Truth(model)


@contextmanager
def without_kernels() -> Iterator[None]:
    """quantpress runs in plain PyTorch on the GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(available, "LEAST_CAPABILITY", (99, 0))
        available.runs_triton.cache_clear()
        yield
    available.runs_triton.cache_clear()


def made(answer: Any) -> tuple[list[int], torch.Tensor]:
    """Tokens of an answer, and their log-probabilities."""
    output = answer.outputs[0]
    there = list(output.token_ids)
    return there, torch.tensor([output.logprobs[i][token].logprob for i, token in enumerate(there)])


def test_kernels_in_graphs_give_what_plain_pytorch_gives(packed: tuple[Engine, Truth]) -> None:
    """Up to the first token that differs: from there on, the answers are about something else."""
    running, _ = packed
    prompts = [tokens(count) for count in (40, 60, 300, 500, 700, 800, 900, 1000)]
    running.forget()
    running.replayed.clear()
    ours = running.generate(*prompts, new=2 * BLOCK)  # blocks are filled by decodes, too
    assert running.replayed.count(FULL) > BLOCK
    running.forget()
    running.replayed.clear()
    with running.without_graphs(), without_kernels():
        plain = running.generate(*prompts, new=2 * BLOCK)
    assert not running.replayed
    compared, off = 0, []
    for one, other in zip(ours, plain, strict=True):
        (got, got_log), (expected, expected_log) = made(one), made(other)
        same = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), len(got))
        compared += same
        off.append((got_log[:same] - expected_log[:same]).abs())
    print("tokens compared", compared, "errors", torch.cat(off).mean(), torch.cat(off).max())
    assert compared > BLOCK
    assert float(torch.cat(off).mean()) < 0.05


def test_prefixes_are_shared_in_packed_blocks(
    packed: tuple[Engine, Truth], request: pytest.FixtureRequest
) -> None:
    """Answers about a prefix that was read before, packed, are close to transformers' own.

    On a CPU the error was at most 0.04 nats with 4 bits and 0.33 with 2; of another prompt's, at least 0.8.
    """
    running, truth = packed
    running.forget()
    first = tokens(700)
    near = CASES[request.node.callspec.params["packed"]][-1]
    for prompt, reused in [(first, 0), (first[:512] + tokens(90), 512), (first, 640)]:
        (answer,) = running.generate(prompt, new=20)
        there, logs = made(answer)
        exact = truth.log_probabilities(prompt, there)[range(len(there)), there]
        assert float((logs - exact).abs().mean()) < near
        assert answer.num_cached_tokens == reused
