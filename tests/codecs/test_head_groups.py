"""Head groups: each group is, to the last bit, a layer of its heads with its codec."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from quantpress.cache.attention.by_heads import attend
from quantpress.cache.fixed.cache import FixedCache
from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.demotion import Demotion
from quantpress.codecs.head_groups import HeadGroups, by_head
from quantpress.codecs.heads import join_heads, take_heads
from quantpress.codecs.protocol import PageCodec, codec_of
from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.kernels import attend as kernels
from quantpress.kernels.attend import Visibility
from quantpress.quantization.spec import CodecSpec

DIM, KV_HEADS, SHARED = 32, 3, 2
HEADS = ((0, 2), (1,))
WIDTHS = {(0, 2): (2, 4), (1,): (3, 1)}


def scalar(bits: int, role: str) -> PageCodec:
    return ScalarPages(CodecSpec(DIM, bits, role))


def settings(recent: int = 16) -> LayerSettings:
    """Heads 0 and 2 with 2 bits for keys and 4 for values, head 1 with 3 and 1."""
    keys, values = (
        HeadGroups(HEADS, tuple(scalar(WIDTHS[heads][side], role) for heads in HEADS))
        for side, role in enumerate(("key", "value"))
    )
    return LayerSettings(keys, values, recent_tokens=recent)


def states(tokens: int = 300, batch: int = 2) -> torch.Tensor:
    return torch.randn(2, batch, KV_HEADS, tokens, DIM, generator=torch.Generator().manual_seed(tokens))


def layers(tokens: int = 300) -> tuple[PackedLayer, list[PackedLayer]]:
    """A layer of head groups, and for each group a layer of one width with its heads."""
    keys, values = states(tokens)
    moment = torch.rand(2, KV_HEADS, DIM, generator=torch.Generator().manual_seed(1)) + 0.1
    whole = PackedLayer.from_states(keys, values, settings(), query_moment=moment)
    alone = [
        PackedLayer.from_states(
            take_heads(keys, heads),
            take_heads(values, heads),
            LayerSettings(
                *(scalar(b, r) for b, r in zip(WIDTHS[heads], ("key", "value"), strict=True)),
                recent_tokens=16,
            ),
            query_moment=take_heads(moment, heads),
        )
        for heads in HEADS
    ]
    return whole, alone


def change(layer: PackedLayer, heads: tuple[int, ...]) -> None:
    """What a cache does to a layer of some heads: append, copy entries, keep tokens, append, cut."""
    more = states(150)
    layer.update(take_heads(more[0], heads), take_heads(more[1], heads))
    layer.batch_select_indices(torch.tensor([1, 0, 1]))
    kept = torch.rand(3, KV_HEADS, 450, generator=torch.Generator().manual_seed(2)).topk(400, dim=-1).indices
    layer.keep(take_heads(kept, heads))
    more = states(200, batch=3)
    layer.update(take_heads(more[0], heads), take_heads(more[1], heads))
    layer.crop(-70)


def test_every_group_is_a_layer_of_its_heads() -> None:
    whole, alone = layers()
    change(whole, (0, 1, 2))
    assert whole.packed_tokens and whole.keys is not None and whole.values is not None
    for number, (heads, layer) in enumerate(zip(HEADS, alone, strict=True)):
        change(layer, heads)
        planes = layer.view().packed.keys.planes
        own = {
            name: plane for name, plane in whole.view().packed.keys.planes.items() if name[0] == str(number)
        }
        assert {f"{number}.{name}" for name in planes} == set(own)
        assert all(torch.equal(plane, own[f"{number}.{name}"]) for name, plane in planes.items())
        assert torch.equal(take_heads(whole.keys + 0, heads), layer.keys + 0)
        assert torch.equal(take_heads(whole.values + 0, heads), layer.values + 0)


@pytest.mark.parametrize("case", ["one query", "several", "mask", "hidden", "sinks"])
def test_attention_reads_group_by_group(case: str) -> None:
    whole, alone = layers(440)
    queries = 1 if case == "one query" else 5
    query = torch.randn(2, KV_HEADS * SHARED, queries, DIM)
    mask = torch.rand(2, KV_HEADS * SHARED, queries, 440) > 0.3 if case == "mask" else None
    dropped = torch.rand(2, KV_HEADS, 440) > 0.5 if case == "hidden" else None
    sinks = torch.randn(KV_HEADS * SHARED) if case == "sinks" else None
    options: dict[str, Any] = {"scaling": 0.3, "softcap": 5.0 if case == "several" else None}
    segments = whole.view().segments()
    seen = Visibility(queries, 440, mask=mask, dropped=dropped)
    found = attend(query, segments, seen, sinks=sinks, **options)
    for heads, layer in zip(HEADS, alone, strict=True):
        own = [n for head in heads for n in range(SHARED * head, SHARED * head + SHARED)]
        rule = Visibility(
            queries,
            440,
            mask=None if mask is None else mask[:, own],
            dropped=None if dropped is None else dropped[:, list(heads)],
        )
        sides = layer.view().segments()
        wanted = kernels.attend(
            query[:, own], sides, rule, sinks=None if sinks is None else sinks[own], **options
        )
        assert torch.equal(found[:, own], wanted)
    torch.testing.assert_close(kernels.attend(query, segments, seen, sinks=sinks, **options), found)


def test_steps_at_fixed_addresses_and_demoted_tokens_are_read_too() -> None:
    """As plain PyTorch reads the same segments with all heads at once."""
    query = torch.randn(2, KV_HEADS * SHARED, 1, DIM)
    (whole, _), cache = layers(440), DynamicCache()
    cache.layers = [whole]
    fixed = FixedCache(cache)
    fixed.enter(new_tokens=1)
    with fixed.step():
        whole.update(*states(1))
        assert whole.fixed is not None
        segments = list(whole.fixed.step_segments())
    demotion = Demotion(torch.rand(2, KV_HEADS, 440), 128, scalar(1, "key"), scalar(1, "value"))
    demoted = PackedLayer.from_states(*states(440), settings(), demotion=demotion).view().segments()
    for some in (segments, demoted):
        seen = Visibility(1, sum(one.tokens for one in some))
        found = attend(query, some, seen, scaling=0.3)
        torch.testing.assert_close(found, kernels.attend(query, some, seen, scaling=0.3))


def test_bytes_are_those_of_each_head() -> None:
    codecs = settings()
    assert codecs.key_codec.bits_per_value == pytest.approx((2 * 2 + 3) / 3 + 16 / DIM)
    assert codec_of(codecs.key_codec.parts()) == codecs.key_codec
    joined = join_heads([torch.ones(1, 2), torch.zeros(1, 1)], HEADS)
    assert joined.tolist() == [[1, 0, 1]]


def test_what_does_not_fit_is_refused() -> None:
    two, four = RawPages(DIM, 16), RawPages(DIM, 32)
    assert by_head([two, two], [four, four]) == (two, four)
    keys, values = by_head([two, four], [two, two])
    assert keys.heads == values.heads == ((0,), (1,))
    with pytest.raises(InvalidInputError, match=r"heads are \(\(0,\), \(2,\)\); give groups"):
        HeadGroups(((0,), (2,)), (two, four))
    with pytest.raises(InvalidInputError, match="one for each group"):
        HeadGroups(((0,), (1,)), (two, RawPages(16)))
    with pytest.raises(InvalidInputError, match="give both the same groups"):
        LayerSettings(keys, two)
    with pytest.raises(InvalidInputError, match=r"shape \(2, 3, 128, 32\), but the codes are for 2 KV heads"):
        PackedLayer.from_states(*states(128), LayerSettings(keys, values, 0, 0))
    hidden = torch.rand(2, KV_HEADS, 300) > 0.5
    with pytest.raises(InvalidInputError, match=r"evicting different numbers .* a plan by layer"):
        PackedLayer.from_states(*states(), settings(), hidden=hidden)
    layer, _ = layers()
    with pytest.raises(InvalidInputError, match=r"evicting different numbers .* a plan by layer"):
        layer.evict(hidden)
