"""The bytes of an engine's cache: what the codecs store, and the tensors beside them."""

import pytest
import torch

from quantpress.cache import WidthPlan
from quantpress.cache.engine_memory import (
    EngineLayer,
    engine_page_bytes,
    engine_widths,
    planned_widths,
    sink_entries,
)
from quantpress.cache.memory_estimate import page_nbytes
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.quantization.spec import CodecSpec


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (256, 128), (96, 96), (80, 80)])
@pytest.mark.parametrize(("keys", "values"), [(4, 4), (3, 3), (2, 2), (4, 2)])
def test_a_page_is_what_the_codecs_store(head_dim: int, value_dim: int, keys: int, values: int) -> None:
    codecs = (
        ScalarPages(CodecSpec(head_dim, keys, "key", scale_dtype="float16", page_keys=True)),
        ScalarPages(CodecSpec(value_dim, values, "value", scale_dtype="float16")),
    )
    stored = sum(page_nbytes(codec) for codec in codecs)
    stored += -stored % 128  # an engine counts whole bytes a token
    assert engine_page_bytes(head_dim, value_dim, keys, values) == stored


def test_what_lies_beside_the_blocks() -> None:
    layer = EngineLayer(kv_heads=8, head_dim=128, value_dim=64)
    for dtype, itemsize in ((torch.bfloat16, 2), (torch.float32, 4)):
        one = EngineLayer(8, 128, 64, itemsize)
        recent = [torch.empty(65, 2 * 128, 8, dim, dtype=dtype, device="meta") for dim in (128, 64)]
        assert one.recent_bytes(64) == sum(part.nbytes for part in recent)
        sinks = [torch.empty(1025, 4, 8, dim, dtype=dtype, device="meta") for dim in (128, 64)]
        assert one.sink_bytes(sink_entries(64)) == sum(part.nbytes for part in sinks)
    assert layer.statistics_bytes == 4 * torch.empty(8, 128).nbytes
    assert EngineLayer(8, 128, 64, query_heads=32).statistics_bytes == 10 * torch.empty(8, 128).nbytes
    assert 32 * EngineLayer(8, 128, 128).request_bytes == pytest.approx(33.5e6, rel=0.01)  # Llama-8B


def test_widths_by_head_are_refused() -> None:
    plan = WidthPlan("", {}, {0: (3, 2), 1: ((2, 3), 2)})
    assert planned_widths(plan, [0]) == [(3, 2)]
    with pytest.raises(InvalidInputError, match=r"by head, \(2, 3\) for the keys .* layer 1.* --by layer"):
        planned_widths(plan, [0, 1])


@pytest.mark.parametrize("name", ["quantpress_5bit", "quantpress_k4", "quantpress_4bits", "fp8", ""])
def test_unknown_dtypes_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="no KV-cache dtype"):
        engine_widths(name)
