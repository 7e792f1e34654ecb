"""The benchmark of quality inside vLLM, without vLLM: what it compares, and with what."""

from types import ModuleType

import pytest
import torch

from tests.benchmarks.loading import benchmark
from tests.pipelines.words import ours


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    """benchmarks/vllm_quality.py as a module."""
    return benchmark("vllm_quality")


def test_texts_are_decoded_as_the_model_reads_them_and_packing_costs_by_width(quality: ModuleType) -> None:
    model = ours().model
    ids = torch.randint(3, model.config.vocab_size, (2, 420))
    own = quality.scored(model, ids, 410, None)
    with torch.no_grad():
        whole = model(ids).logits[:, 410:-1].float().log_softmax(-1)
    torch.testing.assert_close(own, whole, rtol=0, atol=1e-3)
    arms = quality.in_transformers(model, ids, 410, (4, 2))
    assert [(len(kl), len(kl[0])) for kl in arms.values()] == [(2, 9)] * 4
    narrow, wide = (torch.tensor(arms[f"transformers, TurboQuant({bits})"]).mean() for bits in (2, 4))
    assert narrow > 1.5 * wide > 0  # 3 to 7 times with most texts of random words


def test_an_engine_is_compared_with_its_own_width(quality: ModuleType) -> None:
    arms = {"vLLM, quantpress_3bit, profile": [[6.0, 6.0], [9.0, 9.0]]}
    for bits, (plain, preset) in {4: (1.0, 0.5), 3: (5.0, 2.5)}.items():
        names = quality.presses(bits)
        arms |= {name: [[kl] * 2] * 2 for name, kl in zip(names, (plain, preset), strict=True)}
    row = quality.summary(arms, "float32")[0]
    assert (row["bits"], row["kl"].value) == (3, 7.5)
    assert (row["ratio"].value, row["to_preset"].value) == (1.5, 3.0)
    assert "| 7.50000 [6.00000, 9.00000] | 1.50 [1.20, 1.80] |" in quality.shown([row])


def test_a_plan_is_compared_with_one_width_of_as_many_bytes() -> None:
    config = ours().model.config
    half = [(4, 4), (2, 2)] * (config.num_hidden_layers // 2 + 1)
    size = benchmark("vllm_plan").token_bytes
    assert size(config, half) == size(config, [(3, 3)] * len(half)) > 0
