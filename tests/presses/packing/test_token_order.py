"""Survivors are found exactly, or not at all."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantpress.presses.packing.token_order import Survivors, survivor_positions

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def states(tokens: int, dtype: torch.dtype, batch: int = 2, heads: int = 3, dim: int = 8) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, dim).to(dtype)


def picked(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return states.gather(2, positions.unsqueeze(-1).expand(-1, -1, -1, states.shape[-1]))


def permutation(tokens: int, kept: int, batch: int = 2, heads: int = 3) -> torch.Tensor:
    return torch.rand(batch, heads, tokens).argsort(-1)[..., :kept]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(tokens=st.integers(1, 70), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_finds_a_known_permutation(dtype: torch.dtype, tokens: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    keys, values = states(tokens, dtype), states(tokens, dtype, dim=4)
    expected = permutation(tokens, int(share * tokens))
    found = survivor_positions(keys, values, picked(keys, expected), picked(values, expected))
    assert found is not None and torch.equal(found, expected)


def test_finds_neighbours_that_differ_in_one_bit() -> None:
    keys = torch.zeros(1, 1, 64, 32, dtype=torch.bfloat16)
    keys.view(torch.int16)[0, 0] = torch.arange(64).unsqueeze(1) * torch.eye(32, dtype=torch.int64)[5]
    values = torch.zeros_like(keys)
    expected = permutation(64, 40, 1, 1)
    found = survivor_positions(keys, values, picked(keys, expected), picked(values, expected))
    assert found is not None and torch.equal(found, expected)


def test_chunks_agree_with_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = states(100, torch.float32), states(100, torch.float32)
    expected = permutation(100, 60)
    monkeypatch.setattr(
        "quantpress.presses.packing.token_order._WORKSPACE_VALUES", 500
    )  # chunks of 10 tokens
    found = survivor_positions(keys, values, picked(keys, expected), picked(values, expected))
    assert found is not None and torch.equal(found, expected)


def test_equal_tokens_among_the_originals_are_no_obstacle_unless_they_survive() -> None:
    keys, values = states(10, torch.float32), states(10, torch.float32)
    keys[:, :, 3], values[:, :, 3] = keys[:, :, 8], values[:, :, 8]
    others = torch.tensor([9, 0, 4]).expand(2, 3, -1)
    found = survivor_positions(keys, values, picked(keys, others), picked(values, others))
    assert found is not None and torch.equal(found, others)
    twin = torch.tensor([9, 3, 4]).expand(2, 3, -1)
    assert survivor_positions(keys, values, picked(keys, twin), picked(values, twin)) is None


def test_a_token_given_twice_is_refused() -> None:
    keys, values = states(10, torch.float32), states(10, torch.float32)
    twice = torch.tensor([4, 4]).expand(2, 3, -1)
    assert survivor_positions(keys, values, picked(keys, twice), picked(values, twice)) is None


@pytest.mark.parametrize("changed", ["keys", "values"])
def test_either_side_is_enough(changed: str) -> None:
    """Merging changes values, rotating again and ThinK change keys."""
    keys, values = states(30, torch.bfloat16), states(30, torch.bfloat16)
    expected = permutation(30, 12)
    after = {"keys": picked(keys, expected), "values": picked(values, expected)}
    after[changed] = after[changed] * 1.5
    found = survivor_positions(keys, values, after["keys"], after["values"])
    assert found is not None and torch.equal(found, expected)


def test_one_unknown_survivor_leaves_the_order_open() -> None:
    keys, values = states(30, torch.float32), states(30, torch.float32)
    expected = permutation(30, 12)
    after_keys, after_values = picked(keys, expected), picked(values, expected)
    after_keys[1, 2, 5, 0] += 1
    after_values[0, 0, 0, 0] += 1
    assert survivor_positions(keys, values, after_keys, after_values) is None
    assert survivor_positions(keys, None, after_keys, None) is None


def test_keys_alone() -> None:
    keys = states(30, torch.float32)
    expected = permutation(30, 12)
    found = survivor_positions(keys, None, picked(keys, expected), None)
    assert found is not None and torch.equal(found, expected)


def test_more_survivors_than_tokens() -> None:
    keys = states(5, torch.float32)
    assert survivor_positions(keys, None, torch.cat([keys, keys], dim=2), None) is None


def test_sorting_puts_every_head_in_order_of_the_text() -> None:
    keys, values = states(30, torch.float32), states(30, torch.float32, dim=4)
    positions = permutation(30, 12)
    hidden = torch.rand(2, 3, 30) < 0.5
    given = Survivors(*(picked(part, positions) for part in (keys, values)), hidden.gather(2, positions))
    found, in_order = given.sorted_by(positions), positions.sort(-1).values
    assert torch.equal(found.keys, picked(keys, in_order))
    assert torch.equal(found.values, picked(values, in_order))
    assert found.hidden is not None and torch.equal(found.hidden, hidden.gather(2, in_order))
    assert found.scores is None
