"""Estimates equal measurements, byte for byte."""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from quantpress.cache import LayerSettings, PackedLayer, cache_memory
from quantpress.cache.memory_estimate import head_wise_bytes, layer_estimate, page_nbytes
from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.quantization.spec import CodecSpec
from tests.cache.caches import grouped

PAIRS: dict[str, Any] = {
    "4/4": (4, 4, {}),
    "3/2": (3, 2, {}),
    "2.5/3.5": (2.5, 3.5, {}),
    "8/1": (8, 1, {"scale_dtype": "float32"}),
    "prod": (3, 2.5, {"estimator": "prod"}),
}


@pytest.mark.parametrize("tokens", [0, 3, 131, 132, 260, 261, 900])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("plain", "dtype"),
    [(False, torch.bfloat16), (True, torch.bfloat16), (False, torch.float32)],
    ids=["statistics", "plain", "float32"],
)
def test_the_estimate_is_the_measurement(name: str, tokens: int, plain: bool, dtype: torch.dtype) -> None:
    key_bits, value_bits, options = PAIRS[name]
    keys = ScalarPages(CodecSpec(64, key_bits, "key", **options))
    options = {key: value for key, value in options.items() if key != "estimator"}
    values = ScalarPages(CodecSpec(32, value_bits, "value", **options))
    settings = LayerSettings(keys, values, 4, 128, mean_key=not plain, balance=not plain)
    batch, heads = 2, 3
    cache = DynamicCache()
    states = (torch.randn(batch, heads, tokens, dim).to(dtype) for dim in (64, 32))
    moment = None if plain else torch.rand(batch, heads, 64) + 0.1
    cache.layers = [PackedLayer.from_states(*states, settings, query_moment=moment)]
    (measured,) = cache_memory(cache).layers
    assert layer_estimate(settings, tokens, heads, 64, 32, batch, dtype=dtype) == measured


@pytest.mark.parametrize("tokens", [3, 131, 700])
@pytest.mark.parametrize(
    ("kept", "dtype"), [(0.02, torch.bfloat16), (0.3, torch.float32), (0.9, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("raw", [False, True], ids=["3 bits", "raw"])
def test_the_estimate_of_ragged_heads_is_the_measurement(
    tokens: int, kept: float, raw: bool, dtype: torch.dtype
) -> None:
    keys, values = (ScalarPages(CodecSpec(64, 3, role)) for role in ("key", "value"))
    settings = LayerSettings(RawPages(64), RawPages(64), 0, 0) if raw else LayerSettings(keys, values, 4, 32)
    heads = torch.tensor([0.1, 1.0, 1.5]).view(1, 3, 1) * kept
    hidden = torch.rand(1, 3, tokens) > heads
    cache = DynamicCache()
    states = (torch.randn(1, 3, tokens, 64).to(dtype) for _ in range(2))
    moment = None if raw else torch.rand(1, 3, 64) + 0.1
    cache.layers = [PackedLayer.from_states(*states, settings, query_moment=moment, hidden=hidden)]
    assert head_wise_bytes(settings, hidden, dtype=dtype) == cache_memory(cache).total_bytes


def test_the_estimate_of_widths_by_head_is_the_measurement() -> None:
    settings, cache = grouped(64, recent_tokens=16), DynamicCache()
    states = torch.randn(2, 3, 2, 700, 64)
    cache.layers = [PackedLayer.from_states(*states, settings)]
    (measured,) = cache_memory(cache).layers
    assert layer_estimate(settings, 700, 2, 64, batch=3, balanced=False, dtype=torch.float32) == measured
    with pytest.raises(InvalidInputError, match="are for 2 KV heads, but the layer has 3; give one for"):
        layer_estimate(settings, 700, 3, 64)


def test_layers_that_are_not_packed_and_other_codecs() -> None:
    layer = layer_estimate(None, 100, 8, 128)
    assert layer.total_bytes == layer.uncompressed_bytes == 100 * 8 * 2 * 128 * 2
    wide = layer_estimate(None, 100, 8, 128, dtype=torch.float32)
    assert wide.total_bytes == wide.uncompressed_bytes == 100 * 8 * 2 * 128 * 4
    assert page_nbytes(RawPages(64)) == 128 * 64 * 2
    assert page_nbytes(ScalarPages(CodecSpec(128, 3, "key"))) == 128 * 128 * 3 // 8 + 128 * 2


@pytest.mark.parametrize("counts", [{"tokens": -1}, {"kv_heads": 0}, {"batch": 0}, {"head_dim": 0}], ids=str)
def test_counts_out_of_range_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(counts))):
        layer_estimate(None, **{"tokens": 1, "kv_heads": 1, "head_dim": 64, **counts})
