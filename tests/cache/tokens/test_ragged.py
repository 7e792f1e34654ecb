"""Heads that keep different tokens: against a list of tokens for each head, and dense attention over it."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantpress.cache.attention.dispatch import _attend_view
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.layer import PackedLayer
from quantpress.cache.memory import storage_bytes
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.quantization.transform import key_statistics
from tests.cache.caches import lossless, scalar
from tests.cache.test_layer import states
from tests.cache.tokens.test_keep import SPECS, settings_of

BATCH, HEADS, GROUP, DIM = 2, 2, 3, 32
MODULE: Any = SimpleNamespace(is_causal=True)


class Lists:
    """What each head of a layer should keep: keys and values [n, D], by (batch, head)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor) -> None:
        self.heads = {
            (b, h): (keys[b, h][~hidden[b, h]], values[b, h][~hidden[b, h]])
            for b in range(keys.shape[0])
            for h in range(keys.shape[1])
        }

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.heads = {
            (b, h): (torch.cat([k, keys[b, h]]), torch.cat([v, values[b, h]]))
            for (b, h), (k, v) in self.heads.items()
        }

    def crop(self, count: int) -> None:
        self.heads = {at: (k[: len(k) - count], v[: len(v) - count]) for at, (k, v) in self.heads.items()}

    def select(self, entries: list[int]) -> None:
        self.heads = {(new, h): self.heads[b, h] for new, b in enumerate(entries) for h in range(HEADS)}

    def keep(self, kept: dict[tuple[int, int], torch.Tensor]) -> None:
        self.heads = {at: (k[kept[at]], v[kept[at]]) for at, (k, v) in self.heads.items()}


def patterns(tokens: int) -> dict[str, torch.Tensor]:
    """[B, Hkv, T] bool, True: hidden."""
    half = torch.rand(BATCH, HEADS, tokens) < 0.5
    uneven = torch.rand(BATCH, HEADS, tokens) < torch.tensor([[0.0, 0.9], [0.3, 0.6]]).unsqueeze(-1)
    uneven[0, 0] = False
    empty = half.clone()
    empty[0, 1] = True
    few = torch.ones(BATCH, HEADS, tokens, dtype=torch.bool)
    few[..., -7:] = False
    few[1, 0, :2] = False
    few[0, 1] = True
    middle = torch.zeros_like(half)
    middle[..., tokens // 3 : tokens // 2] = True
    first = torch.zeros_like(half)
    first[0, 0, 0] = first[1, 1, :9] = True
    return {"half": half, "uneven": uneven, "empty": empty, "few": few, "middle": middle, "first": first}


NAMES = list(patterns(9))


def pair(tokens: int, name: str, settings: LayerSettings | None = None) -> tuple[PackedLayer, Lists]:
    keys, values = states(tokens)
    hidden = patterns(tokens)[name]
    layer = PackedLayer.from_states(keys, values, settings or lossless(recent_tokens=16), hidden=hidden)
    assert layer.get_seq_length() == tokens
    return layer, Lists(keys, values, hidden)


def assert_same(layer: PackedLayer, lists: Lists) -> None:
    """Dense tensors hold the tokens of each head in order, and zeros for evicted ones."""
    evicted = layer.view().evicted()
    assert evicted is not None
    for side, read in enumerate((layer.keys, layer.values)):
        assert isinstance(read, PackedStates) and read.shape[:3] == evicted.shape
        dense = read + 0
        for (b, h), head in lists.heads.items():
            assert torch.equal(dense[b, h][~evicted[b, h]], head[side])
            assert not dense[b, h][evicted[b, h]].any()


def assert_attends(layer: PackedLayer, lists: Lists, queries: int, tolerance: float = 1e-5) -> None:
    """Attention of `queries` new tokens, against torch's attention for each head alone."""
    batch = len({b for b, _ in lists.heads})
    query = torch.randn(batch, HEADS * GROUP, queries, DIM)
    keys, values = states(queries, batch, seed=99)
    key, _ = layer.update(keys, values)
    lists.append(keys, values)
    assert isinstance(key, PackedStates) and key.packed is not None
    got = _attend_view(MODULE, query, key.packed, None, {}).transpose(1, 2)
    for (b, h), (k, v) in lists.heads.items():
        group = slice(GROUP * h, GROUP * (h + 1))
        seen = torch.ones(queries, len(k), dtype=torch.bool).tril(len(k) - queries)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[b, group], k.expand(GROUP, -1, -1), v.expand(GROUP, -1, -1), attn_mask=seen
        )
        torch.testing.assert_close(got[b, group], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [5, 63, 149, 700])
def test_prefill_append_attend(tokens: int, name: str) -> None:
    """Over several pages after a ragged prefill, one token and many at a time."""
    layer, lists = pair(tokens, name)
    assert_same(layer, lists)
    for new in (1, 5, 130, 1, 300):
        assert_attends(layer, lists, new)
        assert_same(layer, lists)
    assert layer.get_seq_length() == layer.tokens_seen == tokens + 437


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_operations(seed: int) -> None:
    """Append, crop, select, evict, keep, copy, pickle, share; what was shared before stays as it was."""
    generator = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(most, (1,), generator=generator))

    layer, lists = pair(700, NAMES[seed % len(NAMES)])
    held: list[tuple[PackedLayer, Lists]] = []
    for step in range(12):
        held.append((copy.copy(layer), copy.copy(lists)))
        held[-1][0].restore(layer.snapshot())
        action, batch = number(7), len({b for b, _ in lists.heads})
        slots = layer.get_seq_length()
        heads = layer.tokens.heads if layer.tokens is not None else None
        assert heads is not None
        if action == 0:
            added = states(1 + number(300), batch, seed=step)
            layer.update(*added)
            lists.append(*added)
        elif action == 1:
            count = number(slots - heads.whole_from + 1)
            layer.crop(-count) if count else None
            lists.crop(count)
        elif action == 2:
            entries = [number(batch) for _ in range(1 + number(3))]
            layer.batch_select_indices(torch.tensor(entries))
            lists.select(entries)
        elif action == 3:
            layer = copy.deepcopy(layer)
        elif action == 4:
            layer = pickle.loads(pickle.dumps(layer))
        else:
            evicted = layer.view().evicted()
            assert evicted is not None
            gone = torch.rand(batch, HEADS, slots, generator=generator) < 0.3
            if action == 5:
                layer.evict(gone)
            else:
                kept = gone.int().argsort(dim=-1)[..., : slots // 2]
                gone = torch.ones_like(gone).scatter_(2, kept, False)
                layer.keep(kept)
                assert layer.get_seq_length() == slots // 2
            lists.keep({(b, h): ~gone[b, h][~evicted[b, h]] for b, h in lists.heads})
        assert_same(layer, lists)
    for then, expected in held:
        assert_same(then, expected)
    assert_attends(layer, lists, 3)


@pytest.mark.parametrize("name", ["half", "few", "uneven"])
def test_beams_share_pages(name: str) -> None:
    """A context repeated for beams takes no more pages; each beam continues alone."""
    layer, lists = pair(700, name)
    assert layer.tokens is not None
    before = storage_bytes(layer.tokens.packed_tensors())
    layer.batch_repeat_interleave(3)
    lists.select([0, 0, 0, 1, 1, 1])
    assert storage_bytes(layer.tokens.packed_tensors()) == before
    for step in range(4):
        assert_attends(layer, lists, 70)
        order = [0, 1, 0, 5, 4, 3] if step % 2 else [2, 2, 1, 3, 3, 5]
        layer.reorder_cache(torch.tensor(order))
        lists.select(order)
        assert_same(layer, lists)
    layer.batch_select_indices(torch.tensor([False, False, True, False, False, False]))
    lists.select([2])
    assert_same(layer, lists)
    held = storage_bytes(layer.tokens.packed_tensors())
    alone = copy.deepcopy(layer)
    assert alone.tokens is not None
    assert held <= 1.2 * storage_bytes(alone.tokens.packed_tensors())


@pytest.mark.parametrize("bits", SPECS)
def test_nothing_is_encoded_twice(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eviction from a rectangular layer, then from a ragged one: encoding would fail, and values stay."""
    layer = PackedLayer.from_states(*torch.randn(2, 2, 2, 1000, 64), settings_of(bits, recent_tokens=16))
    keys, values = layer.keys + 0, layer.values + 0
    monkeypatch.setattr("quantpress.codecs.scalar.encode_pages", None)
    lists = Lists(keys, values, torch.zeros(2, 2, 1000, dtype=torch.bool))
    for share in (0.4, 0.5):
        evicted = layer.view().evicted()
        gone = torch.rand(2, 2, 1000) < torch.tensor([[share, 0.1], [0.8, 0.3]]).unsqueeze(-1)
        gone[..., 990:] = False
        layer.evict(gone)
        here = torch.zeros_like(gone) if evicted is None else evicted
        lists.keep({(b, h): ~gone[b, h][~here[b, h]] for b in range(2) for h in range(2)})
        for side, read in enumerate((layer.keys + 0, layer.values + 0)):
            evicted = layer.view().evicted()
            assert evicted is not None and layer.packed_tokens > 128
            for (b, h), head in lists.heads.items():
                torch.testing.assert_close(read[b, h][~evicted[b, h]], head[side], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", ["2", "2.5", "3", "4", "8"])
def test_statistics_are_those_of_the_tokens_kept(bits: str) -> None:
    """The same mean key, weights and orders as for each head alone, with only the tokens that it keeps."""
    keys, values = torch.randn(2, 2, 2, 900, 64) * torch.rand(64).exp() + torch.randn(64)
    hidden = torch.rand(2, 2, 900) < torch.tensor([[0.5, 0.3], [0.1, 0.8]]).unsqueeze(-1)
    keys[hidden] *= 50  # that must not count
    moment = torch.rand(2, 2, 64) + 0.1
    settings = settings_of(bits, recent_tokens=0)
    layer = PackedLayer.from_states(keys, values, settings, hidden=hidden, query_moment=moment)
    assert layer.tokens is not None and layer.tokens.key_transform is not None
    found = layer.tokens.key_transform.tensors()
    assert set(found) >= {"mean", "weight"}
    for b in range(2):
        for h in range(2):
            mine = keys[b : b + 1, h : h + 1, ~hidden[b, h]][:, :, 4:]
            expected = key_statistics(mine, moment[b : b + 1, h : h + 1], settings.key_codec.groups)
            for name, tensor in expected.tensors().items():
                torch.testing.assert_close(found[name][b, h], tensor[0, 0], rtol=1e-4, atol=1e-4)


def test_resident_bytes_follow_what_is_kept() -> None:
    """Half of the tokens of all heads together, unevenly: half the bytes, tables and lengths included."""
    keys, values = torch.randn(2, 1, 4, 4116, 64)
    settings = scalar(64, bits=4, recent_tokens=16)
    whole = PackedLayer.from_states(keys, values, settings)
    hidden = torch.rand(1, 4, 4116) < torch.tensor([0.05, 0.35, 0.65, 0.95]).view(1, 4, 1)
    half = PackedLayer.from_states(keys, values, settings, hidden=hidden)
    moved = PackedLayer.from_states(keys, values, settings)
    moved.evict(hidden)
    bytes_of = [
        storage_bytes(
            [*one.tokens.packed_tensors(), *one.tokens.dense_tensors(), *one.tokens.metadata_tensors()]
        )
        for one in (whole, half, moved)
        if one.tokens is not None
    ]
    row = 2 * (64 * 4 / 8 + 2)
    kept = int((~hidden).sum())
    for one in bytes_of[1:]:
        assert 0.47 < one / bytes_of[0] < 0.56
        rest = one - row * kept
        assert rest < 4 * (128 * row + 24 * 2 * 64 * 4 + 4096)  # a page, 20 tokens unpacked, transforms


def test_what_is_let_go_is_freed() -> None:
    """Cropping whole pages and dropping batch entries free memory."""
    layer, _ = pair(2000, "half", scalar(recent_tokens=16))
    assert layer.tokens is not None
    before = storage_bytes(layer.tokens.packed_tensors())
    layer.update(*states(2560, seed=3))
    grown = storage_bytes(layer.tokens.packed_tensors())
    assert grown > 2.5 * before
    layer.crop(2000)
    layer.update(*states(128, seed=4))
    assert storage_bytes(layer.tokens.packed_tensors()) < 1.4 * before
    layer.batch_select_indices(torch.tensor([1]))
    assert storage_bytes(layer.tokens.packed_tensors()) < 0.8 * before


def test_cropping_among_evicted_tokens_is_refused() -> None:
    layer, lists = pair(700, "half")
    assert layer.tokens is not None and layer.tokens.heads is not None
    whole_from = layer.tokens.heads.whole_from
    with pytest.raises(InvalidInputError, match=f"cut such a layer to {whole_from} tokens or more"):
        layer.crop(whole_from - 1)
    with pytest.raises(InvalidInputError, match="single heads have evicted tokens"):
        _ = layer.keys[:, :, :100] + 0
    assert_same(layer, lists)
    layer.crop(-layer.get_seq_length())
    assert layer.get_seq_length() == 0 and layer.packed_tokens == 0
    added = states(300)
    layer.update(*added)
    assert torch.equal(layer.keys + 0, added[0])


@pytest.mark.parametrize(
    "hidden", [torch.zeros(2, 2, 699) > 0, torch.zeros(2, 2, 700)], ids=["shape", "dtype"]
)
def test_bad_hidden_is_refused(hidden: torch.Tensor) -> None:
    layer = PackedLayer.from_states(*states(700), lossless(recent_tokens=16))
    for use in (layer.evict, lambda it: PackedLayer.from_states(*states(700), lossless(), hidden=it)):
        with pytest.raises(InvalidInputError, match="hidden must be bool"):
            use(hidden)
    assert layer.get_seq_length() == 700


def test_attention_that_cannot_tell_evicted_tokens_is_refused() -> None:
    """A model that computes with the keys before attention would see zeros as tokens."""
    layer, _ = pair(700, "half")
    keys, _ = layer.update(*states(1))
    with pytest.raises(UnsupportedModelError, match="use a press that evicts as many in each head"):
        _ = keys * 2
    assert (keys[:, :, -1:] * 2).shape == (2, 2, 1, 32)


@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_what_came_later(additive: bool) -> None:
    """A mask may hide later tokens; one that hides tokens before the last evicted one is refused."""
    layer, lists = pair(700, "uneven")
    added = states(40, seed=7)
    layer.update(*added)
    lists.append(*added)
    mask = torch.ones(2, 1, 1, 741, dtype=torch.bool)
    mask[0, :, :, 700:710] = False
    query, (keys, values) = torch.randn(2, HEADS * GROUP, 1, DIM), states(1, seed=8)
    key, _ = layer.update(keys, values)
    lists.append(keys, values)
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    assert isinstance(key, PackedStates) and key.packed is not None
    got = _attend_view(MODULE, query, key.packed, given, {}).transpose(1, 2)
    for (b, h), (k, v) in lists.heads.items():
        group = slice(GROUP * h, GROUP * (h + 1))
        seen = torch.cat([torch.ones(len(k) - 41, dtype=torch.bool), mask[b, 0, 0, 700:]])
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[b, group], k[seen].expand(GROUP, -1, -1), v[seen].expand(GROUP, -1, -1)
        )
        torch.testing.assert_close(got[b, group], expected, rtol=1e-5, atol=1e-5)
    mask[1, :, :, 3] = False
    with pytest.raises(UnsupportedModelError, match="without padding"):
        _attend_view(MODULE, query, key.packed, mask, {})


def test_entries_named_while_decoding() -> None:
    """DMSPress goes on naming slots, evicted ones again; naming more of the first slots is refused."""
    layer, lists = pair(700, "middle")
    slot = torch.tensor([699, 690, 701])
    before = patterns(700)["middle"].nonzero(as_tuple=True)
    later = (torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1]), slot)
    named = [torch.cat(both) for both in zip(before, later, strict=True)]
    module: Any = SimpleNamespace(is_causal=True, masked_key_indices=named)
    layer.update(*states(3, seed=5))
    lists.append(*states(3, seed=5))
    view = layer.view()
    query = torch.randn(2, HEADS * GROUP, 1, DIM)
    got = _attend_view(module, query, view, None, {}).transpose(1, 2)
    for (b, h), (k, v) in lists.heads.items():
        seen = torch.ones(len(k), dtype=torch.bool)
        for at, s in enumerate(slot.tolist()):
            if (int(later[0][at]), int(later[1][at])) == (b, h):
                seen[s - 703] = False
        group = slice(GROUP * h, GROUP * (h + 1))
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[b, group], k[seen].expand(GROUP, -1, -1), v[seen].expand(GROUP, -1, -1)
        )
        torch.testing.assert_close(got[b, group], expected, rtol=1e-5, atol=1e-5)
    more = [torch.cat([index, torch.tensor([at])]) for index, at in zip(named, (0, 0, 100), strict=True)]
    module.masked_key_indices = more
    with pytest.raises(InvalidInputError, match="use one head-wise press at the prefill"):
        _attend_view(module, query, view, None, {})
