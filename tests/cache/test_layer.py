"""PackedLayer against DynamicLayer: with a lossless codec every operation gives the same keys and values."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from quantpress.cache import host
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError, NonFiniteError
from tests.cache.caches import lossless, scalar

LENGTHS = [1, 3, 4, 5, 63, 147, 148, 149, 257, 700]


def states(tokens: int, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, 2, tokens, 32, generator=generator)
    return keys, values


def pair(tokens: int, settings: LayerSettings | None = None) -> tuple[PackedLayer, DynamicLayer]:
    keys, values = states(tokens)
    packed = PackedLayer.from_states(keys, values, settings or lossless(recent_tokens=16))
    plain = DynamicLayer()
    plain.update(keys, values)
    return packed, plain


def assert_same(packed: PackedLayer, plain: DynamicLayer) -> None:
    assert packed.get_seq_length() == plain.get_seq_length()
    position = host.mask_query(3)
    assert packed.get_mask_sizes(position) == plain.get_mask_sizes(position)
    if plain.get_seq_length():
        for ours, theirs in ((packed.keys, plain.keys), (packed.values, plain.values)):
            assert ours is not None and ours.shape == theirs.shape
            assert torch.equal(ours + 0, theirs)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_prefill_and_append(tokens: int) -> None:
    packed, plain = pair(tokens)
    assert_same(packed, plain)
    for step, new in enumerate([1, 1, 130, 1, 300]):
        added = states(new, seed=step + 1)
        for ours, theirs in zip(packed.update(*added), plain.update(*added), strict=True):
            assert torch.equal(ours + 0, theirs)
        assert_same(packed, plain)
    assert packed.packed_tokens == (tokens + 433 - 4 - 16) // 128 * 128
    assert packed.tokens_seen == tokens + 433


@pytest.mark.parametrize("tokens", LENGTHS)
def test_streaming_from_empty(tokens: int) -> None:
    packed, plain = PackedLayer(lossless(recent_tokens=16)), DynamicLayer()
    assert_same(packed, plain)
    for step, new in enumerate([tokens, 1, 200]):
        added = states(new, seed=step)
        packed.update(*added)
        plain.update(*added)
        assert_same(packed, plain)


@pytest.mark.parametrize(
    "length", [0, 1, 3, 4, 5, 131, 132, 133, 260, 300, 685, 699, 700, 900, -1, -16, -17, -300, -700]
)
def test_crop_then_append(length: int) -> None:
    packed, plain = pair(700)
    packed.crop(length or -700)
    plain.crop(length if length < 0 else -max(700 - length, 0) or (0 if host.CROP_REMOVES else 700))
    assert_same(packed, plain)
    added = states(400, seed=5)
    packed.update(*added)
    plain.update(*added)
    assert_same(packed, plain)


def test_crop_beyond_the_start_is_refused() -> None:
    packed, plain = pair(10)
    with pytest.raises(InvalidInputError, match=r"crop\(-11\) of a layer with 10 tokens"):
        packed.crop(-11)
    assert_same(packed, plain)


CHANGES: dict[str, Callable[[DynamicLayer], None]] = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(3),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "select_by_mask": lambda layer: layer.batch_select_indices(torch.tensor([True, False])),
    "offload": lambda layer: (layer.offload(), layer.prefetch())[0],
}


@pytest.mark.parametrize("tokens", [3, 700])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "settings", [lossless(recent_tokens=16), scalar(bits=2.5, recent_tokens=16)], ids=["raw", "2.5"]
)
def test_batch_operations(change: str, tokens: int, settings: LayerSettings) -> None:
    packed, plain = pair(tokens, settings)
    plain.keys, plain.values = packed.keys + 0, packed.values + 0
    CHANGES[change](packed)
    CHANGES[change](plain)
    assert_same(packed, plain)
    added = states(2, batch=plain.keys.shape[0], seed=9)
    packed.update(*added)
    plain.update(*added)
    assert_same(packed, plain)


def test_repacking_cropped_tokens_gives_the_same_codes() -> None:
    """A page that was cut, decoded and filled up again with its own tokens has the same codes."""
    for bits in (1, 2, 3, 4, 2.5):
        packed = PackedLayer.from_states(*states(700), scalar(bits=bits, recent_tokens=16))
        before = {name: plane.clone() for name, plane in packed.view().packed.keys.planes.items()}
        keys, values = packed.keys + 0, packed.values + 0
        packed.crop(300)
        packed.update(keys[:, :, 300:], values[:, :, 300:])
        after = packed.view().packed.keys.planes
        for name, plane in before.items():
            if name.startswith("codes"):
                same = (plane == after[name]).float().mean()
                assert same > 0.999, (bits, name, same)


def test_deepcopy_and_snapshot_are_independent() -> None:
    packed, _ = pair(700, scalar(recent_tokens=16))
    before = packed.keys + 0, packed.values + 0
    twin = copy.deepcopy(packed)
    snapshot = packed.snapshot()
    held = packed.keys
    for again in range(3):
        packed.update(*states(500, seed=again))
        packed.crop(200)
        packed.update(*states(300, seed=again + 10))
        packed.restore(snapshot)
        assert packed.get_seq_length() == packed.tokens_seen == 700
        assert torch.equal(packed.keys + 0, before[0]) and torch.equal(packed.values + 0, before[1])
    assert torch.equal(held + 0, before[0])
    twin.update(*states(1))
    assert twin.get_seq_length() == 701 and packed.get_seq_length() == 700
    shared = {
        t.untyped_storage().data_ptr() for t in twin.tokens.packed_tensors() + twin.tokens.dense_tensors()
    }
    assert not shared & {
        t.untyped_storage().data_ptr() for t in packed.tokens.packed_tensors() + packed.tokens.dense_tensors()
    }


def test_two_answers_from_one_snapshot_do_not_meet() -> None:
    """Both sides of a snapshot append to the same buffer with spare capacity; neither may see the other's
    pages.
    """
    packed = PackedLayer.from_states(*states(700), scalar(recent_tokens=16))
    packed.update(*states(300, seed=1))
    snapshot = packed.snapshot()
    packed.update(*states(300, seed=2))
    first = packed.snapshot()
    expected = packed.keys + 0
    packed.restore(snapshot)
    packed.update(*states(300, seed=3))
    packed.restore(first)
    assert torch.equal(packed.keys + 0, expected)


def test_reset() -> None:
    packed, _ = pair(700)
    packed.reset()
    assert packed.get_seq_length() == packed.tokens_seen == 0 and packed.tokens is None
    plain = DynamicLayer()
    added = states(300, seed=4)
    packed.update(*added)
    plain.update(*added)
    assert_same(packed, plain)


def test_trimming_as_presses_do() -> None:
    packed, plain = pair(700)
    for layer in (packed, plain):
        layer.keys = layer.keys[:, :, :600]
        layer.values = layer.values[:, :, :600]
    assert_same(packed, plain)


def test_assigning_other_numbers_is_refused() -> None:
    packed, plain = pair(700)
    with pytest.raises(
        InvalidInputError, match=r"700 tokens was assigned .*\(2, 2, 100, 32\).*before TurboQuant"
    ):
        packed.keys = torch.randn(2, 2, 100, 32)
    assert_same(packed, plain)


def test_statistics_never_change_what_is_packed() -> None:
    """The first page sets the mean; later pages, however different, change neither it nor its codes."""
    layer = PackedLayer(scalar(recent_tokens=16))
    layer.update(*states(160))
    assert layer.packed_tokens == 128 and layer.tokens.key_transform is not None
    mean, codes = layer.tokens.key_transform.mean.clone(), layer.view().packed.keys.planes["codes0"].clone()
    keys, values = states(400, seed=1)
    layer.update(keys + 7, values)
    assert torch.equal(layer.tokens.key_transform.mean, mean)
    assert torch.equal(layer.view().packed.keys.planes["codes0"][:, :, :1], codes)


def test_nothing_of_the_raw_states_is_kept() -> None:
    keys, values = states(700)
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in (keys, values)]
    storages = [tensor.untyped_storage().data_ptr() for tensor in (keys, values)]
    layer = PackedLayer.from_states(keys, values, scalar())
    kept = layer.tokens.dense_tensors() + layer.tokens.packed_tensors() + layer.tokens.metadata_tensors()
    assert not {tensor.untyped_storage().data_ptr() for tensor in kept} & set(storages)
    del keys, values, kept
    gc.collect()
    assert all(ref() is None for ref in alive)
    assert layer.get_seq_length() == 700


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_states_are_refused(bad: float) -> None:
    keys, values = states(700)
    keys[1, 0, 300, 5] = bad
    with pytest.raises(NonFiniteError):
        PackedLayer.from_states(keys, values, scalar())


def test_negative_windows_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="recent_tokens is -1"):
        lossless(recent_tokens=-1)


def test_different_dimensions_for_keys_and_values() -> None:
    keys, values = torch.randn(1, 1, 400, 64), torch.randn(1, 1, 400, 32)
    settings = LayerSettings(scalar(64, bits=8).key_codec, scalar(32, bits=8).value_codec, recent_tokens=16)
    layer = PackedLayer.from_states(keys, values, settings)
    got_keys, got_values = layer.keys, layer.values
    assert (
        isinstance(got_keys, PackedStates)
        and got_keys.shape == keys.shape
        and got_values.shape == values.shape
    )
    assert (got_keys - keys).norm() < 0.02 * keys.norm() and (
        got_values - values
    ).norm() < 0.02 * values.norm()


def test_queries_known_before_the_first_page_balance_it() -> None:
    """A short prefill packs nothing; its query moment balances the page that is packed later."""
    keys, values = states(100)
    moment = torch.rand(2, 2, 32) + 0.1
    layer = PackedLayer.from_states(keys, values, scalar(recent_tokens=16), query_moment=moment)
    assert layer.packed_tokens == 0
    layer.update(*states(100, seed=1))
    assert layer.packed_tokens == 128 and layer.tokens is not None
    assert layer.tokens.key_transform is not None and layer.tokens.key_transform.weight is not None
    assert layer.tokens.query_moment is None
