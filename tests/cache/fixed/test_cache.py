"""Tokens at fixed addresses are the growing ones: step by step, over flushes, and back."""

import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from quantpress.cache import PackedLayer, cache_memory
from quantpress.cache.attention.step import attend_step
from quantpress.cache.fixed.cache import FixedCache
from quantpress.cache.fixed.fixable import unfixable
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.kernels.attend import Visibility, attend
from tests.cache.caches import grouped, lossless, scalar
from tests.cache.test_layer import states
from tests.cache.tokens.test_ragged import patterns

SETTINGS = {"lossless": lossless(recent_tokens=16), "three_bits": scalar(bits=3, recent_tokens=16)}
EVERY = {**SETTINGS, "by_head": grouped(recent_tokens=16)}


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> LayerSettings:
    return EVERY[request.param]


def filled(settings: LayerSettings, lengths: tuple[int, ...] = (300, 700), batch: int = 2) -> DynamicCache:
    cache = DynamicCache()
    for tokens in lengths:
        cache.layers.append(PackedLayer.from_states(*states(tokens, batch), settings))
    return cache


def numbers(layer: PackedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.keys is not None and layer.values is not None
    return layer.keys + 0, layer.values + 0


def assert_equal(cache: DynamicCache, other: DynamicCache) -> None:
    for one, two in zip(cache.layers, other.layers, strict=True):
        assert (one.get_seq_length(), one.packed_tokens) == (two.get_seq_length(), two.packed_tokens)
        assert one.tokens_seen == two.tokens_seen
        assert all(map(torch.equal, numbers(one), numbers(two)))


def new_tokens(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for number in range(count):
        yield states(1, seed=100 + number)


def steps(fixed: FixedCache, count: int) -> None:
    for added in new_tokens(count):
        with fixed.step():
            for layer in fixed.layers:
                layer.update(*added)
        fixed.flush()


def grow(cache: DynamicCache, count: int) -> None:
    for added in new_tokens(count):
        for layer in cache.layers:
            layer.update(*added)


@pytest.mark.parametrize("settings", EVERY, indirect=True)
@pytest.mark.parametrize("count", [1, 120, 300])
def test_steps_are_updates(settings: LayerSettings, count: int) -> None:
    cache, other = filled(settings), filled(settings)
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=count)
    addresses = fixed.addresses()
    steps(fixed, count)
    assert fixed.entered and fixed.addresses() == addresses
    grow(other, count)
    assert_equal(cache, other)
    fixed.release()
    assert not fixed.entered
    assert_equal(cache, other)


@pytest.mark.parametrize("pattern", ["half", "uneven", "empty", "few", "first"])
def test_steps_where_heads_keep_different_tokens(settings: LayerSettings, pattern: str) -> None:
    """Pages by table, at addresses that stay, and attention over the whole memory."""
    cache = DynamicCache()
    for tokens in (500, 900):
        hidden = patterns(tokens)[pattern]
        cache.layers.append(PackedLayer.from_states(*states(tokens), settings, hidden=hidden))
    other = copy.deepcopy(cache)
    for tokens in (300, 130):  # of which some were evicted in every head
        for one in (cache, other):
            for layer in one.layers:
                layer.update(*states(tokens, seed=tokens))
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=300)
    addresses = fixed.addresses()
    query = torch.randn(2, 6, 1, 32)
    for _ in range(3):
        steps(fixed, 100)
        grow(other, 100)
        assert_equal(cache, other)
        for own, layer in zip(fixed.layers, other.layers, strict=True):
            assert own.fixed is not None
            got = attend_step(query, own.fixed.step_segments(), 0.2, None, None)
            view = layer.view()
            rule = Visibility(1, sum(segment.tokens for segment in view.segments()))
            expected = attend(query, view.segments(), rule, scaling=0.2)
            torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert fixed.entered and fixed.addresses() == addresses
    fixed.release()
    assert_equal(cache, other)


def test_device_counts_what_the_host_counts(settings: LayerSettings) -> None:
    cache = filled(settings)
    fixed = FixedCache(cache)
    fixed.enter()
    for count in (1, 130):
        steps(fixed, count)
        for layer in fixed.layers:
            tokens, window = layer.fixed, layer.fixed.window
            assert window.recent.unique().tolist() == [tokens.used] == [int(window.newest) + 1]
            assert window.packed.unique().tolist() == [tokens.packed]


def test_more_tokens_than_fit() -> None:
    cache, other = filled(SETTINGS["lossless"]), filled(SETTINGS["lossless"])
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=0)
    addresses = fixed.addresses()
    steps(fixed, 200)
    grow(other, 200)
    assert fixed.addresses() != addresses
    assert_equal(cache, other)


USES = {
    "crop": lambda layer: layer.crop(-40),
    "crop_into_a_page": lambda layer: layer.crop(150),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([True, False])),
    "offload": lambda layer: (layer.offload(), layer.prefetch()),
    "several_tokens": lambda layer: layer.update(*states(5, seed=9)),
    "a_stray_token": lambda layer: layer.update(*states(1, seed=9)),
    "trim": lambda layer: setattr(layer, "keys", layer.keys[:, :, :250]),
    "reserve": lambda layer: layer.reserve(1000),
    "reset": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("use", USES)
def test_any_other_use_goes_back_to_growing(use: str) -> None:
    cache, other = filled(SETTINGS["three_bits"]), filled(SETTINGS["three_bits"])
    fixed = FixedCache(cache)
    fixed.enter()
    steps(fixed, 140)
    grow(other, 140)
    for one in (*cache.layers, *other.layers):
        USES[use](one)
    assert not fixed.entered
    if use == "reset":
        assert cache.get_seq_length() == 0
        return
    assert_equal(cache, other)
    batch = numbers(cache.layers[0])[0].shape[0]
    for one in (*cache.layers, *other.layers):
        one.update(*states(200, batch, seed=11))
    assert_equal(cache, other)


def test_views_and_copies_outlast_steps() -> None:
    cache = filled(SETTINGS["three_bits"])
    fixed = FixedCache(cache)
    fixed.enter()
    steps(fixed, 20)
    before = [numbers(layer) for layer in cache.layers]
    held = [(layer.keys, layer.values) for layer in cache.layers]
    copies, snapshots = copy.deepcopy(cache), [layer.snapshot() for layer in cache.layers]
    steps(fixed, 260)
    for layer, kept, copied, expected in zip(cache.layers, held, copies.layers, before, strict=True):
        assert not all(map(torch.equal, numbers(layer), expected))
        assert all(torch.equal(one + 0, two) for one, two in zip(kept, expected, strict=True))
        assert all(map(torch.equal, numbers(copied), expected))
    for layer, snapshot, expected in zip(cache.layers, snapshots, before, strict=True):
        layer.restore(snapshot)
        assert all(map(torch.equal, numbers(layer), expected))


def test_questions_share_memory() -> None:
    """Undone answers leave no trace and no second copy of the pages; the next has the same addresses."""
    cache = filled(SETTINGS["three_bits"])
    for layer in cache.layers:
        layer.reserve(300)
    before = [numbers(layer) for layer in cache.layers]
    snapshots = [layer.snapshot() for layer in cache.layers]
    pages = [layer.tokens.key_pages.tensors[0].data_ptr() for layer in cache.layers]
    fixed = FixedCache(cache)
    seen = []
    for _ in range(3):
        fixed.enter(new_tokens=300)
        seen.append(fixed.addresses())
        steps(fixed, 290)
        assert [layer.tokens.key_pages.tensors[0].data_ptr() for layer in cache.layers] == pages
        for layer, snapshot, expected in zip(cache.layers, snapshots, before, strict=True):
            layer.restore(snapshot)
            assert all(map(torch.equal, numbers(layer), expected))
    assert seen[0] == seen[1] == seen[2]


def test_memory_counts_spare_capacity() -> None:
    cache = filled(SETTINGS["three_bits"])
    plain = cache_memory(cache)
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=1280)
    memory = cache_memory(cache)
    assert memory.uncompressed_bytes == plain.uncompressed_bytes
    for layer, before, after in zip(fixed.layers, plain.layers, memory.layers, strict=True):
        page = sum(
            plane[:, :, :1].nbytes
            for plane in layer.tokens.key_pages.tensors + layer.tokens.value_pages.tensors
        )
        assert after.packed_bytes >= before.packed_bytes + 9 * page
    window = fixed.layers[0].fixed.window
    assert memory.layers[0].dense_bytes >= window.keys.nbytes + window.values.nbytes
    fixed.release()
    assert cache_memory(cache).dense_bytes == plain.dense_bytes


def test_numbers_that_are_not_finite_are_refused_at_the_flush() -> None:
    cache = filled(SETTINGS["three_bits"], lengths=(300,), batch=1)
    fixed = FixedCache(cache)
    fixed.enter()
    layer = fixed.layers[0]
    keys, values = states(1, 1)
    with pytest.raises(NonFiniteError):
        for _ in range(150):
            with fixed.step():
                layer.update(keys * float("nan"), values)
            fixed.flush()
    length = layer.get_seq_length()
    fixed.release()
    assert layer.get_seq_length() == length


def test_caches_that_cannot_be_fixed() -> None:
    static = filled(SETTINGS["lossless"])
    static.layers.append(StaticLayer(300))
    empty = filled(SETTINGS["lossless"])
    empty.layers.append(DynamicLayer())
    short = filled(SETTINGS["lossless"], lengths=(300, 50))
    for cache, reason in (
        (static, "layers 2 of the cache are StaticLayers"),
        (empty, "layer 2 of the cache has no tokens"),
        (short, "layer 1 of"),
        (DynamicCache(), "no layers"),
    ):
        assert reason in str(unfixable(cache))
        with pytest.raises(InvalidInputError, match=reason):
            FixedCache(cache)
    with pytest.raises(InvalidInputError, match="none of the 50 tokens"):
        short.layers[1].fix(FixedCache(filled(SETTINGS["lossless"])).fixed_layers[0].window)
