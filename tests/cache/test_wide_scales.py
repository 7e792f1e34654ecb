"""Keys and values outside the range of float16: as exact as any others, at the prefill and page by page."""

import copy
import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import DynamicCache

from quantpress.cache import PackedLayer, cache_memory
from quantpress.cache.saved.layers import cache_of, cache_parts
from quantpress.codecs.parts import Parts
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import Visibility, attend
from tests.cache.caches import scalar
from tests.cache.paged.paging import small

SETTINGS = scalar(bits=4, recent_tokens=16)
States = tuple[torch.Tensor, torch.Tensor]


def states(tokens: int, size: float = 1.0) -> States:
    keys, values = torch.randn(2, 1, 2, tokens, 32) * size
    return keys, values


def error(layer: PackedLayer, exact: States, size: float, query: torch.Tensor) -> torch.Tensor:
    """|o' - o| / |o| against torch's own attention, the logits divided by `size`: [1, 2, 8]."""
    scaling = 32**-0.5 / size
    near = attend(
        query, layer.view().segments(), Visibility(8, exact[0].shape[2], causal=False), scaling=scaling
    )
    out = scaled_dot_product_attention(query, *exact, scale=scaling)
    return (near - out).norm(dim=-1) / out.norm(dim=-1)


def joined(one: States, other: States) -> States:
    return torch.cat((one[0], other[0]), 2), torch.cat((one[1], other[1]), 2)


@pytest.mark.parametrize("size", [2.0**-26, 2.0**17, 2.0**20], ids=str)
def test_attention_is_as_exact_at_any_size(size: float) -> None:
    """Attention to keys and values times s, logits over s, is s times attention: the errors are the same."""
    (keys, values), query = states(700), torch.randn(1, 2, 8, 32)
    usual = error(PackedLayer.from_states(keys, values, SETTINGS), (keys, values), 1.0, query)
    sized = keys * size, values * size
    layer = PackedLayer.from_states(*sized, SETTINGS)
    assert (error(layer, sized, size, query) - usual).abs().max() < 2e-3


def test_pages_that_come_later_widen_the_scales_of_all() -> None:
    first, later, query = states(300), states(300, 2.0**20), torch.randn(1, 2, 8, 32)
    layer = PackedLayer.from_states(*first, SETTINGS)
    before, snapshot = (layer.keys + 0, layer.values + 0), layer.snapshot()
    bytes_before = cache_memory(layers_of(layer)).layers[0].packed_bytes
    layer.update(*later)
    assert layer.packed_tokens == 512
    assert all(
        map(
            torch.equal,
            (layer.keys[:, :, :260] + 0, layer.values[:, :, :260] + 0),
            (s[:, :, :260] for s in before),
        )
    )
    assert error(layer, joined(first, later), 2.0**20, query).max() < 0.3
    pages = 2 * 2 * 4  # heads, sides, pages
    used = sum(
        p.nbytes for s in (layer.tokens.key_pages, layer.tokens.value_pages) for p in s.planes.values()
    )
    assert used == pages * (128 * 32 // 2 + 128 * 4)  # 4 bits a code, 4 bytes a scale
    assert cache_memory(layers_of(layer)).layers[0].packed_bytes >= used
    other = again(layer)
    assert all(map(torch.equal, (other.keys + 0, other.values + 0), (layer.keys + 0, layer.values + 0)))
    for one in (layer, other):  # goes on, in either form
        one.update(*states(200))
        assert one.packed_tokens == 768
    layer.restore(snapshot)
    assert all(map(torch.equal, (layer.keys + 0, layer.values + 0), before))
    assert cache_memory(layers_of(layer)).layers[0].packed_bytes == bytes_before


def test_heads_that_keep_different_tokens_widen_too() -> None:
    first, later = states(400), states(300, 2.0**20)
    hidden = torch.rand(1, 2, 400) < torch.tensor([[[0.2], [0.6]]])
    hidden[..., -4:] = False
    layer = PackedLayer.from_states(*first, SETTINGS, hidden=hidden)
    layer.update(*later)
    for found, exact in zip((layer.keys, layer.values), joined(first, later), strict=True):
        newest = (slice(None), slice(None), slice(-150, -20))
        assert ((found + 0)[newest] - exact[newest]).norm() < 0.15 * exact[newest].norm()


def layers_of(layer: PackedLayer) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [copy.copy(layer)]
    return cache


def again(layer: PackedLayer) -> PackedLayer:
    """The layer after being taken apart and rebuilt, as in a file."""
    parts = cache_parts(layers_of(layer))
    outline = json.loads(json.dumps(parts.outline()))
    return cache_of(
        Parts.from_outline(outline, {name: t.clone() for name, t in parts.flat().items()})
    ).layers[0]


def test_a_pool_says_what_it_needs() -> None:
    """The memory is allocated before the vectors are known, and the dtype of the scales with it."""
    keys, values = (s[0] for s in states(400, 2.0**20))
    paged = small(recent_tokens=16)
    free = paged.free_blocks
    with pytest.raises(InvalidInputError, match=r'a key has a scale of .*scale_dtype="float32"'):
        paged.add(keys, values)
    assert paged.free_blocks == free
    wide = small(recent_tokens=16, scale_dtype="float32")
    sequence, query = wide.add(keys, values), torch.randn(1, 4, 1, 32)
    assert wide.nbytes > paged.nbytes
    large = wide.attend(query, [sequence], scaling=2.0**-22) / 2.0**20
    sequence = paged.add(keys / 2.0**20, values / 2.0**20)
    usual = paged.attend(query, [sequence], scaling=2.0**-2)
    assert (large - usual).norm() < 0.01 * usual.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_attention_kernels_read_float32_scales(bits: int) -> None:
    settings, size = scalar(64, bits, recent_tokens=16), 2.0**20
    keys, values = torch.randn(2, 1, 2, 700, 64, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    outputs = []
    for factor in (1.0, size):
        layer = PackedLayer.from_states(keys * factor, values * factor, settings)
        segments = layer.view().segments()
        outputs.append(attend(query, segments, Visibility(1, 700), scaling=0.125 / factor).float() / factor)
    assert (outputs[1] - outputs[0]).norm() < 0.01 * outputs[0].norm()
