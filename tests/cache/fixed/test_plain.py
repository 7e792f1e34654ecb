"""Plain layers at fixed addresses are the growing ones: over a window that fills, and back."""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantpress.cache import PackedLayer, cache_memory, host
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.attention.step import attend_step
from quantpress.cache.fixed.cache import FixedCache
from quantpress.cache.fixed.plain import BufferedLayer, BufferedSlidingLayer, become
from quantpress.cache.saved.layers import cache_of, cache_parts
from tests.cache.caches import lossless
from tests.cache.test_layer import states

WINDOW = 20
CONFIG = Gemma3TextConfig(
    sliding_window=WINDOW, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
)


def filled(tokens: int, batch: int = 2) -> DynamicCache:
    """A sliding-window layer, a full one, and a full one whose attention is to look over a window."""
    cache = DynamicCache(config=CONFIG)
    cache.layers.append(DynamicLayer())
    for index in range(3):
        cache.update(*states(tokens, batch, seed=index), index)
    return cache


def numbers(cache: DynamicCache) -> list[torch.Tensor]:
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [tensor for tensor in held if tensor is not None]


def assert_equal(cache: DynamicCache, other: DynamicCache) -> None:
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert one.get_seq_length() == two.get_seq_length()
        place = host.mask_query(3)
        assert one.get_mask_sizes(place) == two.get_mask_sizes(place)
    assert all(map(torch.equal, numbers(cache), numbers(other)))


def steps(fixed: FixedCache, count: int, seed: int = 100) -> list[PackedStates]:
    """What the last step gave to attention."""
    given: list[Any] = []
    for number in range(count):
        added = states(1, seed=seed + number)
        with fixed.step():
            given = [layer.update(*added) for layer in fixed.layers]
        fixed.flush()
    return [keys for keys, _ in given]


def grow(cache: DynamicCache, count: int, seed: int = 100) -> None:
    for number in range(count):
        for layer in cache.layers:
            layer.update(*states(1, seed=seed + number))


def seen(cache: DynamicCache, index: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a growing layer's newest token sees, from every token that there was."""
    layer = cache.layers[index]
    keys, values = layer.keys, layer.values
    return (keys, values) if window is None else (keys[:, :, -window:], values[:, :, -window:])


@pytest.mark.parametrize("tokens", [3, WINDOW - 2, WINDOW - 1, WINDOW, 63])
@pytest.mark.parametrize("count", [1, 2, WINDOW, 3 * WINDOW + 1])
def test_steps_are_updates(tokens: int, count: int) -> None:
    """Attention over the whole buffer is softmax over the tokens that the growing layers show."""
    cache, other = filled(tokens), filled(tokens)
    full = DynamicLayer()  # every token, for what the sliding-window layer has to show
    full.update(*states(tokens, seed=0))
    fixed = FixedCache(cache, windows={2: WINDOW})
    fixed.enter(new_tokens=count)
    addresses, query = fixed.addresses(), torch.randn(2, 6, 1, 32)
    given = steps(fixed, count)
    assert fixed.entered and fixed.addresses() == addresses
    grow(other, count)
    for number in range(count):
        full.update(*states(1, seed=100 + number))
    shown = [
        (full.keys[:, :, -WINDOW:], full.values[:, :, -WINDOW:]),
        seen(other, 1, None),
        seen(other, 2, WINDOW),
    ]
    for layer, (keys, values) in zip(fixed.layers, shown, strict=True):
        got = attend_step(query, layer.fixed.step_segments(), 0.2, None, None)
        scores = query.view(2, 2, 3, 32) @ keys.transpose(-1, -2) * 0.2
        expected = (scores.softmax(-1) @ values).view(2, 1, 6, 32)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for one, two in zip(given, (full, other.layers[1], other.layers[2]), strict=True):
        assert one.packed is not None and one.packed.step is not None
        there = (one + 0)[:, :, :, 0].sort(dim=-1).values  # attention that decodes sees the same tokens
        assert torch.equal(
            there,
            two.keys[
                :,
                :,
                -there.shape[2] :,
                :,
            ][..., 0]
            .sort(dim=-1)
            .values,
        )
    assert_equal(cache, other)
    fixed.release()
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in other.layers]
    assert_equal(cache, other)
    cache.update(*states(5, seed=1), 0)
    other.update(*states(5, seed=1), 0)
    assert_equal(cache, other)


def test_a_full_layer_that_outgrows_its_buffer() -> None:
    cache, other = filled(30), filled(30)
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=4)
    addresses = fixed.addresses()
    steps(fixed, 3)
    assert fixed.addresses() == addresses
    steps(fixed, 30, seed=103)
    assert fixed.addresses() != addresses and fixed.entered
    grow(other, 33)
    assert_equal(cache, other)


USES = {
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([True, False])),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "several_tokens": lambda layer: layer.update(*states(5, seed=9)),
    "a_stray_token": lambda layer: layer.update(*states(1, seed=9)),
    "evict": lambda layer: setattr(layer, "keys", layer.keys[:, :, ::2]),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("use", USES)
def test_any_other_use_goes_back_to_the_plain_layer(use: str) -> None:
    cache, other = filled(7), filled(7)
    fixed = FixedCache(cache)
    fixed.enter()
    steps(fixed, 5)
    grow(other, 5)
    for one in (*cache.layers, *other.layers):
        USES[use](one)
    assert [type(layer) for layer in cache.layers] == [type(layer) for layer in other.layers]
    assert not fixed.entered
    assert_equal(cache, other)
    keys = cache.layers[0].keys
    batch = 2 if keys is None else keys.shape[0]
    if use == "evict":
        return  # values were left alone
    for one in (*cache.layers, *other.layers):
        one.update(*states(40, batch, seed=11))
    assert_equal(cache, other)


def test_what_was_read_outlasts_steps() -> None:
    """Tensors, copies and pickles; and a plain layer's tensors after its buffer is written to again."""
    cache = filled(30)
    fixed = FixedCache(cache)
    fixed.enter()
    steps(fixed, 10)
    held, expected = numbers(cache), [tensor.clone() for tensor in numbers(cache)]
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache_of(cache_parts(cache))]
    steps(fixed, 50, seed=200)
    assert all(map(torch.equal, held, expected))
    for other in copies:
        assert not any(isinstance(layer, BufferedLayer) for layer in other.layers)
        assert other.layers[0].cumulative_length == 40
        assert all(map(torch.equal, numbers(other), expected))
    fixed.release()
    after, kept = numbers(cache), [tensor.clone() for tensor in numbers(cache)]
    fixed.enter()
    cache.layers[1].crop(-30)
    fixed.enter()
    steps(fixed, 60, seed=300)
    assert all(map(torch.equal, after, kept))


def test_the_same_memory_after_tokens_were_undone() -> None:
    cache = filled(30)
    fixed, seen, before = FixedCache(cache), [], [vars(layer).copy() for layer in cache.layers]
    kinds = [type(layer) for layer in cache.layers]
    for _ in range(3):
        fixed.enter(new_tokens=50)
        seen.append(fixed.addresses())
        steps(fixed, 40)
        for layer, kind, state in zip(cache.layers, kinds, before, strict=True):  # `context_rollback`
            become(layer, kind, state)
        assert not fixed.entered and fixed.fits(cache)
    assert seen[0] == seen[1] == seen[2]


def test_beside_packed_layers_and_other_numbers_of_heads() -> None:
    def make() -> DynamicCache:
        cache = filled(40)
        cache.layers.append(PackedLayer.from_states(*states(300), lossless(recent_tokens=16)))
        wide = DynamicLayer()
        wide.update(*torch.randn(2, 2, 5, 40, 32, generator=torch.Generator().manual_seed(4)))
        cache.layers.append(wide)
        return cache

    cache, other, query = make(), make(), torch.randn(2, 10, 1, 32)
    fixed = FixedCache(cache)
    fixed.enter()
    for number in range(200):
        added = [states(1, seed=number)] * 4 + [torch.randn(2, 2, 5, 1, 32)]
        with fixed.step():
            for layer, (keys, values) in zip(fixed.layers, added, strict=True):
                layer.update(keys, values)
        fixed.flush()
        for layer, (keys, values) in zip(other.layers, added, strict=True):
            layer.update(keys, values)
    got = attend_step(query, cache.layers[4].fixed.step_segments(), 0.2, None, None)
    keys, values = other.layers[4].keys, other.layers[4].values
    expected = (query.view(2, 5, 2, 32) @ keys.transpose(-1, -2) * 0.2).softmax(-1) @ values
    torch.testing.assert_close(got.view(2, 5, 2, 32), expected, rtol=1e-4, atol=1e-5)
    fixed.release()
    assert all(torch.equal(one + 0, two + 0) for one, two in zip(numbers(cache), numbers(other), strict=True))


def test_memory_counts_the_buffer() -> None:
    cache = filled(30)
    plain = cache_memory(cache)
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=100)
    memory = cache_memory(cache)
    assert isinstance(cache.layers[0], BufferedSlidingLayer) and isinstance(
        cache.layers[0], DynamicSlidingWindowLayer
    )
    assert memory.layers[1].uncompressed_bytes == plain.layers[1].uncompressed_bytes
    assert memory.layers[1].dense_bytes * 30 == plain.layers[1].dense_bytes * 131
    assert memory.layers[0].dense_bytes == 2 * 2 * 2 * WINDOW * 32 * 4
