"""The choices of a layer by head are exact within two groups: nothing of equal bytes has a smaller error."""

import itertools
import random

import pytest

from quantpress.evaluation.fitting.head_choices import MOST_GROUPS, head_choices, pair_errors


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_no_other_widths_in_two_groups_are_better(heads: int) -> None:
    chance = random.Random(heads)
    sides = ({bits: [chance.random() for _ in range(heads)] for bits in (1, 2, 4)} for _ in range(2))
    errors = pair_errors(*sides)
    costs = {(k, v): 5 + 16 * k + 16 * v for k, v in errors[0]}
    found = head_choices(errors, costs)
    best: dict[int, float] = {}
    for pairs in itertools.product(costs, repeat=heads):
        cost, error = (
            sum(map(costs.__getitem__, pairs)),
            sum(e[p] for e, p in zip(errors, pairs, strict=True)),
        )
        if len({*pairs}) <= MOST_GROUPS:
            best[cost] = min(error, best.get(cost, error))
    for cost, error in best.items():
        chosen, pairs = max((one for one in found if one[0].cost <= cost), key=lambda one: one[0].cost)
        assert chosen.error <= error + 1e-12 and len({*pairs}) <= MOST_GROUPS
        assert chosen.cost == sum(map(costs.__getitem__, pairs))
        assert chosen.error == pytest.approx(sum(e[p] for e, p in zip(errors, pairs, strict=True)))
    assert [one.cost for one, _ in found] == sorted({one.cost for one, _ in found})
