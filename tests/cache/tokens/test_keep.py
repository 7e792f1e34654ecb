"""Keeping selected tokens: the same numbers as a gather of a DynamicLayer, and the same codes as before."""

from typing import Any

import pytest
import torch

from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.protocol import Planes
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import unpack_pages
from quantpress.quantization.spec import CodecSpec
from tests.cache.caches import lossless, scalar
from tests.cache.test_layer import assert_same, pair, states

LENGTHS = [5, 63, 149, 257, 700]


def choice(length: int, count: int, shape: tuple[int, int] = (2, 2)) -> torch.Tensor:
    """Distinct slots for each head, in any order."""
    return torch.rand(*shape, length).topk(count, dim=-1).indices


def gathered(states: Any, slots: torch.Tensor) -> torch.Tensor:
    index = slots.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1])
    result: torch.Tensor = states.gather(2, index).contiguous()
    return result


@pytest.mark.parametrize("assigns", [False, True], ids=["keep", "assigned"])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_keep_is_a_gather(tokens: int, assigns: bool) -> None:
    """Several times, with tokens appended between; heads keep different numbers of sinks and recent ones."""
    packed, plain = pair(tokens, lossless(recent_tokens=16))
    for step, new in enumerate([1, 260, 130, 1]):
        kept = choice(plain.get_seq_length(), max(1, plain.get_seq_length() * 3 // 4))
        in_order = kept.sort(dim=-1).values
        if assigns:
            packed.keys, packed.values = gathered(packed.keys, kept), gathered(packed.values, kept)
        else:
            packed.keep(kept)
        plain.keys, plain.values = gathered(plain.keys, in_order), gathered(plain.values, in_order)
        assert_same(packed, plain)
        added = states(new, seed=step + 1)
        for ours, theirs in zip(packed.update(*added), plain.update(*added), strict=True):
            assert torch.equal(ours + 0, theirs)
    packed.crop(-3)
    plain.crop(-3)
    assert_same(packed, plain)
    assert packed.tokens_seen == tokens + 392 - 3


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [699], list(range(690, 700)), list(range(700))], ids=len)
def test_only_sinks_only_recent_or_all(kept: list[int]) -> None:
    packed, plain = pair(700, lossless(recent_tokens=16))
    slots = torch.tensor(kept).expand(2, 2, -1)
    packed.keep(slots.flip(-1))
    plain.keys, plain.values = gathered(plain.keys, slots), gathered(plain.values, slots)
    assert_same(packed, plain)
    added = states(300, seed=1)
    packed.update(*added)
    plain.update(*added)
    assert_same(packed, plain)


SPECS: dict[str, dict[str, Any]] = {
    "1": {"bits": 1},
    "2": {"bits": 2},
    "2.5": {"bits": 2.5},
    "3": {"bits": 3},
    "4": {"bits": 4},
    "8": {"bits": 8},
    "sketch": {"bits": 3, "estimator": "prod"},
}


def settings_of(name: str, **windows: int) -> LayerSettings:
    options = SPECS[name]
    key = CodecSpec(head_dim=64, role="key", **options)
    value = CodecSpec(head_dim=64, role="value", bits=options["bits"])
    return LayerSettings(ScalarPages(key), ScalarPages(value), **windows)


def by_token(planes: Planes, spec: CodecSpec) -> dict[str, torch.Tensor]:
    """Codes, scales, signs of each packed token: [B, Hkv, T, ...]."""
    widths = {f"codes{i}": (group.bits, group.channels) for i, group in enumerate(spec.groups)}
    widths["sketch"] = (1, spec.head_dim)
    return {
        name: (unpack_pages(plane, *widths[name], spec.role) if name in widths else plane).flatten(2, 3)
        for name, plane in planes.items()
    }


def stored(layer: PackedLayer) -> list[dict[str, torch.Tensor]]:
    tokens, settings = layer.tokens, layer.settings
    assert tokens is not None
    pairs = ((tokens.key_pages, settings.key_codec), (tokens.value_pages, settings.value_codec))
    return [by_token(pages.planes, codec.spec) for pages, codec in pairs]  # type: ignore[attr-defined]


def take(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [torch.stack([rows[b, h][slots[b, h]] for h in range(rows.shape[1])]) for b in range(rows.shape[0])]
    )


@pytest.mark.parametrize("name", SPECS)
def test_codes_stay_bit_for_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is encoded: encoding would fail here."""
    keys, values = torch.randn(2, 2, 2, 1000, 64)
    layer = PackedLayer.from_states(keys, values, settings_of(name, recent_tokens=16))
    before, sinks = stored(layer), 4
    monkeypatch.setattr("quantpress.codecs.scalar.encode_pages", None)
    kept = torch.cat([choice(4, 3), 4 + choice(996, 700)], dim=-1)
    layer.keep(kept)
    ordered = kept.sort(dim=-1).values
    assert layer.tokens is not None
    start, packed = layer.tokens.sinks.tokens, layer.packed_tokens
    assert start == 3 and packed >= 512
    slots = ordered[..., start : start + packed] - sinks
    for then, now in zip(before, stored(layer), strict=True):
        assert then.keys() == now.keys()
        for plane in then:
            assert torch.equal(now[plane], take(then[plane], slots)), plane


@pytest.mark.parametrize("name", ["2", "3", "4"])
def test_leftovers_get_their_codes_back(name: str) -> None:
    """Tokens that fill no page are decoded, and get the same codes when they are packed again.

    The exception is a vector with a coordinate far beyond the last level: one in some thousands.
    """
    keys, values = torch.randn(2, 2, 2, 900, 64)
    layer = PackedLayer.from_states(keys, values, settings_of(name, recent_tokens=16))
    before, packed = stored(layer), layer.packed_tokens
    kept = torch.arange(4, 4 + 300).expand(2, 2, -1) + 7  # packed ones only: two pages and 44 left over
    layer.keep(kept)
    assert packed > 311 and layer.packed_tokens == 256
    layer.update(*torch.randn(2, 2, 2, 200, 64))
    for then, now in zip(before, stored(layer), strict=True):
        for plane in (plane for plane in then if plane.startswith("codes")):
            apart = now[plane][:, :, :300] != take(then[plane], kept - 4)
            apart = apart.flatten(3).any(-1)
            assert not apart[:, :, :256].any() and apart.float().mean() < 0.01, plane


def test_snapshots_and_views_stay_as_they_are() -> None:
    layer = PackedLayer.from_states(*states(700), scalar(recent_tokens=16))
    keys, values = layer.keys + 0, layer.values + 0
    snapshot, view = layer.snapshot(), layer.view()
    for _ in range(2):
        layer.keep(choice(700, 500))
        layer.update(*states(300, seed=2))
        assert torch.equal(view.dense_keys(), keys)
        layer.restore(snapshot)
        assert torch.equal(layer.keys + 0, keys) and torch.equal(layer.values + 0, values)
        assert layer.tokens_seen == 700


def test_what_is_let_go_is_freed() -> None:
    layer = PackedLayer.from_states(*states(4000), scalar(recent_tokens=16))
    assert layer.tokens is not None
    before = sum(tensor.untyped_storage().nbytes() for tensor in layer.tokens.packed_tensors())
    layer.keep(torch.arange(1000).expand(2, 2, -1))
    held = layer.tokens.packed_tensors() + layer.tokens.dense_tensors()
    after = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert sum(after.values()) < 0.6 * before


@pytest.mark.parametrize("tokens", [100, 700])
@pytest.mark.parametrize(
    "slots",
    [
        lambda n: torch.zeros(2, 2, 2, dtype=torch.int64),
        lambda n: torch.full((2, 2, 1), n),
        lambda n: torch.full((2, 2, 1), -1),
        lambda n: torch.zeros(2, 1, 1, dtype=torch.int64),
        lambda n: torch.zeros(2, 2, 1),
        lambda n: torch.zeros(2, dtype=torch.int64),
    ],
    ids=["twice", "behind", "before", "heads", "dtype", "shape"],
)
def test_bad_slots(tokens: int, slots: Any) -> None:
    packed, plain = pair(tokens)
    with pytest.raises(InvalidInputError, match="tokens to keep must be"):
        packed.keep(slots(tokens))
    assert_same(packed, plain)


@pytest.mark.parametrize("tokens", [100, 700])
def test_other_numbers_are_refused_packed_or_not(tokens: int) -> None:
    packed, plain = pair(tokens)
    refusal = pytest.raises(InvalidInputError, match="the same `gather` of keys and values")
    kept = choice(tokens, 50)
    changed = packed.values * 2
    channels = packed.keys.gather(2, torch.randint(tokens, (2, 2, 50, 32)))
    for values in (changed, changed[:, :, :50], gathered(changed, kept), channels):
        with refusal:
            packed.values = values
    assert_same(packed, plain)
    packed.keys = gathered(packed.keys, kept)
    values = plain.values
    with refusal:
        packed.values = gathered(values, kept)


def test_keys_and_values_must_keep_the_same() -> None:
    packed, _ = pair(700)
    keys, values = packed.keys, packed.values
    packed.keys = gathered(keys, choice(700, 50))
    with pytest.raises(InvalidInputError, match="the same `gather`"):
        packed.values = gathered(values, choice(700, 50))


def test_a_gather_is_read_like_any_tensor() -> None:
    packed, plain = pair(700)
    kept = choice(700, 90)
    ours, theirs = gathered(packed.keys, kept), gathered(plain.keys, kept)
    assert ours.shape == theirs.shape and torch.equal(ours + 0, theirs)
    assert torch.equal(ours[:, :, -5:], theirs[:, :, -5:]) and torch.equal(
        ours.norm(dim=-1), theirs.norm(dim=-1)
    )


@pytest.mark.parametrize("count", [1, 16, 17, 700])
def test_the_newest_tokens_are_read_without_decoding(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = pair(700, lossless(recent_tokens=16))
    assert torch.equal(packed.keys[:, :, -count:] + 0, plain.keys[:, :, -count:])
    if count <= 16:
        monkeypatch.setattr("quantpress.cache.tokens.segments._decode", None)
        assert torch.equal(packed.values[:, :, -count:], plain.values[:, :, -count:])
