"""Bytes are measured: against a walk over every tensor a layer can reach, and against plain tokens."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantpress.cache.layer import PackedLayer
from quantpress.cache.memory import cache_memory, storage_bytes
from tests.cache.caches import scalar


def reachable_tensors(value: Any, found: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Every tensor held by an object, by storage: our own walk, which knows nothing of the layer's parts."""
    if isinstance(value, torch.Tensor):
        found[value.untyped_storage().data_ptr()] = value
    elif isinstance(value, dict):
        for item in value.values():
            reachable_tensors(item, found)
    elif isinstance(value, list | tuple):
        for item in value:
            reachable_tensors(item, found)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        for item in vars(value).values():
            reachable_tensors(item, found)
    return found


def filled(bits: float, tokens: int, dtype: torch.dtype = torch.bfloat16) -> DynamicCache:
    cache, dim, heads = DynamicCache(), 128, 2
    states = torch.randn(2, 1, heads, tokens, dim).to(dtype)
    cache.layers.append(
        PackedLayer.from_states(*states, scalar(dim, bits=bits), query_moment=torch.ones(1, heads, dim))
    )
    return cache


@pytest.mark.parametrize(
    ("bits", "dtype", "least"),
    [(4, torch.bfloat16, 3.6), (3, torch.float16, 4.6), (2, torch.bfloat16, 6.5), (4, torch.float32, 7.0)],
    ids=str,
)
def test_ratio_with_tails_and_metadata(bits: float, dtype: torch.dtype, least: float) -> None:
    cache = filled(bits, 16384, dtype)
    memory = cache_memory(cache)
    plain = DynamicCache()
    plain.update(*torch.zeros(2, 1, 2, 16384, 128, dtype=dtype), 0)
    whole = plain.layers[0].keys.nbytes + plain.layers[0].values.nbytes
    assert memory.uncompressed_bytes == whole
    found = reachable_tensors(vars(cache.layers[0]), {})
    walked = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    assert memory.total_bytes == walked
    assert whole / walked >= least
    assert memory.ratio == pytest.approx(whole / walked)
    assert memory.bits_per_value == pytest.approx(8 * walked / (2 * 2 * 16384 * 128))


def test_nominal_width_is_not_what_is_reported() -> None:
    assert cache_memory(filled(4, 16384)).bits_per_value > 4.1


@pytest.mark.parametrize("new", [1, 200, 1000])
def test_growth_is_counted(new: int) -> None:
    """Spare capacity counts, and appending never makes the cache much larger than its tokens."""
    cache = filled(4, 4096)
    layer = cache.layers[0]
    for _ in range(new):
        layer.update(*torch.randn(2, 1, 2, 1, 128).to(torch.bfloat16))
    memory = cache_memory(cache)
    found = reachable_tensors(vars(layer), {})
    assert memory.total_bytes == sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    assert memory.layers[0].tokens == 4096 + new
    assert memory.ratio > 3.0


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 16)], ids=str
)
def test_a_plain_cache_is_as_large_as_itself(dtype: torch.dtype, bits: int) -> None:
    cache = DynamicCache()
    cache.update(*torch.randn(2, 1, 2, 100, 64).to(dtype), 0)
    memory = cache_memory(cache)
    assert memory.total_bytes == memory.uncompressed_bytes == 2 * 2 * 100 * 64 * bits // 8
    assert (memory.ratio, memory.bits_per_value) == (1.0, bits)
    assert memory.layers[0].tokens_kept == 100
    assert cache_memory(DynamicCache()).ratio == 1.0


def test_slices_count_with_what_they_keep_alive() -> None:
    whole = torch.zeros(1000)
    assert storage_bytes([whole[:10], whole[10:20]]) == 4000


def test_dictionary_adds_up() -> None:
    report = cache_memory(filled(3, 1000)).as_dict()
    parts = report["packed_bytes"] + report["dense_bytes"] + report["metadata_bytes"]
    assert report["total_bytes"] == parts == sum(layer["total_bytes"] for layer in report["layers"])
