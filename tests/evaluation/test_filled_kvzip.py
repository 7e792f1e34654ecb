"""KVzip in the grid: its ragged pages fill the budget, and it keeps what kvpress's own press keeps."""

import copy
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress.cache import cache_memory
from quantpress.evaluation.divergence.documents import Document
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.equal_bytes import HEAD_WISE, Shape, grid_arms
from quantpress.presses import Compose
from tests.presses.reading import lossless, read
from tests.presses.test_generation import Tokenizer
from tests.tiny_models import prompt, tiny_model

CONTEXT = 1200


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model with a cache of 16 bits, and a tokenizer for KVzip to find."""
    monkeypatch.setattr("kvpress.presses.kvzip_press.AutoTokenizer", Tokenizer)
    return copy.deepcopy(tiny_model("llama")).bfloat16()


@pytest.mark.parametrize(
    ("bits", "dtype"), [(16, torch.bfloat16), (2, torch.bfloat16), (8, torch.float32)], ids=str
)
def test_it_fills_the_budget_in_every_text(
    half: Any, bits: int, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = half.to(dtype)
    shape = Shape.of(model.config, CONTEXT, dtype)
    (arm,) = grid_arms(shape, [HEAD_WISE], (bits,), (0.2,))
    for seed in (0, 1):
        memory = cache_memory(read(model, arm.make(), prompt(CONTEXT, seed=seed), DynamicCache()))
        part = memory.total_bytes / shape.bytes(CONTEXT, 16)
        assert 0.17 < part <= 0.2
        assert memory.bits_per_value >= bits
    assert not caplog.records


def test_in_16_bits_it_is_kvzip_of_the_same_ratio(half: Any) -> None:
    (arm,) = grid_arms(Shape.of(half.config, CONTEXT), [HEAD_WISE], (16,), (0.5,))
    press: Any = arm.make()
    filled = read(half, press, prompt(CONTEXT), DynamicCache())
    ratio = press.presses[0].compression_ratio
    plain = read(half, Compose([kvpress.KVzipPress(ratio), lossless()]), prompt(CONTEXT), DynamicCache())
    kept = [[layer.tokens_kept for layer in cache_memory(cache).layers] for cache in (filled, plain)]
    assert kept[0] == kept[1] and 0.3 * CONTEXT < sum(kept[0]) / len(kept[0]) < 0.55 * CONTEXT


def test_a_press_without_batches_reads_documents_one_by_one(half: Any) -> None:
    ids = [torch.cat([prompt(700, seed=seed)[0], prompt(9, seed=7)[0]]) for seed in (0, 1)]
    documents = [Document(f"piece {i}", one, 700) for i, one in enumerate(ids)]
    (arm,) = grid_arms(Shape.of(half.config, 700), [HEAD_WISE], (4,), (0.25,))
    assert arm.one_by_one
    together = DivergenceProbe(half, documents, queries=2).over(arm.make(), one_by_one=True)
    for document, one in zip(documents, together, strict=True):
        (alone,) = DivergenceProbe(half, [document], queries=2).over(arm.make())
        assert one.kl == pytest.approx(alone.kl, rel=0.1, abs=1e-4)
        assert one.resident_bytes == alone.resident_bytes
    assert together[0].kl != together[1].kl
