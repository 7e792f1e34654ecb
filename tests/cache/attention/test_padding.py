"""Padding in front of the sequences of a batch: recognised, taken for starts, and the same as its mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache import PackedLayer
from quantpress.cache.attention import dispatch
from quantpress.cache.attention.causal import causal_mask, left_padding
from quantpress.kernels.attend import DenseSegment, Segment, Visibility
from tests.cache.caches import grouped, lossless, scalar

CPU = torch.device("cpu")
HIDDEN = torch.tensor([0, 40, 260])  # nothing, some of the first page, and all of the first two
MODULE: Any = SimpleNamespace(is_causal=True, layer_idx=0)


def padded_mask(queries: int, tokens: int, hidden: torch.Tensor = HIDDEN, kind: str = "bool") -> torch.Tensor:
    """[B, 1, Tq, T], or [B, T] of 0 and 1 where `kind` is "flash"."""
    seen = torch.arange(tokens) >= hidden[:, None]
    if kind == "flash":
        return seen.long()
    mask = (causal_mask(queries, tokens, None, CPU) & seen[:, None])[:, None]
    if kind == "bool":
        return mask
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf if kind == "inf" else torch.finfo().min)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("kind", ["bool", "inf", "lowest", "flash"])
def test_padding_is_recognised(kind: str, queries: int) -> None:
    found = left_padding(padded_mask(queries, 300, kind=kind), queries, 300)
    assert found is not None and found.starts.tolist() == HIDDEN.tolist() and found.most == 260
    none = left_padding(padded_mask(queries, 300, 0 * HIDDEN, kind), queries, 300)
    assert none is not None and none.most == 0


def test_only_the_last_tokens_of_a_longer_flash_mask_count() -> None:
    found = left_padding(padded_mask(1, 300, kind="flash"), 1, 100)
    assert found is not None and found.starts.tolist() == [0, 0, 60]


def changed(mask: torch.Tensor, index: Any, value: float) -> torch.Tensor:
    mask[index] = value
    return mask


@pytest.mark.parametrize(
    "mask",
    [
        changed(padded_mask(5, 300), (0, 0, slice(None), 7), False),
        changed(padded_mask(5, 300), (1, 0, 2, 3), True),
        changed(padded_mask(5, 300), (1, 0, 4, 299), False),
        changed(padded_mask(5, 300, kind="inf"), (0, 0, slice(None), 7), 0.5),
        changed(padded_mask(5, 300).repeat(1, 2, 1, 1), (0, 1, slice(None), 0), False),
        changed(padded_mask(5, 300, kind="flash"), (0, 299), 0),
        padded_mask(5, 300, torch.tensor([0, 297])),
        padded_mask(5, 300, torch.tensor([0, 296]), "flash"),
        padded_mask(5, 300).long(),
        padded_mask(5, 299, kind="flash"),
    ],
    ids=[
        "hole",
        "padding seen",
        "newest hidden",
        "weight",
        "one head",
        "right",
        "blind",
        "blind flash",
        "numbers",
        "short",
    ],
)
def test_anything_else_is_not_padding(mask: torch.Tensor) -> None:
    assert left_padding(mask, 5, 300) is None


def attend_both(
    layer: PackedLayer, queries: int, hidden: torch.Tensor, kind: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor, list[Segment], Visibility]:
    """`queries` more tokens by the wrapped sdpa, and by torch's with the mask; what the first one read."""
    calls: list[tuple[list[Segment], Visibility]] = []
    attend = dispatch.attend

    def noted(query: torch.Tensor, segments: list[Segment], rule: Visibility, **options: Any) -> torch.Tensor:
        calls.append((segments, rule))
        return attend(query, segments, rule, **options)

    monkeypatch.setattr(dispatch, "attend", noted)
    query, new = torch.randn(3, 6, queries, 32), torch.randn(2, 3, 2, queries, 32)
    keys, values = layer.update(*new)
    tokens = keys.shape[2]
    mask = padded_mask(queries, tokens, hidden, kind)
    got, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](MODULE, query, keys, values, mask, scaling=0.3)
    dense = [states.dense().repeat_interleave(3, 1) for states in (keys, values)]
    expected = F.scaled_dot_product_attention(
        query, *dense, attn_mask=padded_mask(queries, tokens, hidden), scale=0.3
    )
    return got.transpose(1, 2), expected, *calls[0]


@pytest.mark.parametrize("queries", [1, 150])
@pytest.mark.parametrize("settings", [scalar, grouped])
@pytest.mark.parametrize("kept", [None, 330], ids=["all", "evicted"])
def test_starts_say_what_the_mask_says(
    kept: int | None, settings: Any, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every head has evicted as many tokens before."""
    keys, values = torch.randn(2, 3, 2, 450, 32)
    layer = PackedLayer.from_states(keys, values, settings(recent_tokens=16))
    if kept is not None:
        layer.keep(torch.rand(3, 2, 450).topk(kept, -1).indices.sort(-1).values)
    kind = "flash" if queries == 1 else "bool"
    got, expected, segments, rule = attend_both(layer, queries, HIDDEN, kind, monkeypatch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert rule.mask is None and rule.causal
    starts = [one.starts[:, 0] for one in segments if one.starts is not None]
    assert sum(starts).tolist() == HIDDEN.tolist()  # type: ignore[union-attr]
    assert isinstance(segments[2], DenseSegment) and segments[2].tokens >= queries


def test_layers_share_starts_and_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, waits = padded_mask(2, 300), list[int]()
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append(1) or tolist(self))
    tokens = torch.zeros(3, 2, 300, 8)
    found = [left_padding(mask, 2, 300) for _ in range(3)]
    hidden = [one.hide([DenseSegment(tokens, tokens)], 3)[0] for one in found if one is not None]
    assert waits == [1] and len(hidden) == 3
    assert hidden[0].starts is hidden[2].starts and hidden[0].lengths is hidden[2].lengths


def test_a_mask_that_is_more_than_padding_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = torch.randn(2, 3, 2, 450, 32)
    layer = PackedLayer.from_states(keys, values, lossless(recent_tokens=16))
    *_, rule = attend_both(layer, 5, torch.tensor([0, 453, 260]), "bool", monkeypatch)
    assert rule.mask is not None
