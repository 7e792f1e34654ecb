"""The knapsack is exact: no other choice within the budget has a smaller error."""

import itertools
import random

import pytest

from quantpress.errors import InvalidInputError
from quantpress.evaluation.fitting import allocation
from quantpress.evaluation.fitting.allocation import Choice, allocate, widened


def items(chance: random.Random, step: int) -> list[list[Choice]]:
    """A few items with choices of any order, some of them no better than cheaper ones."""
    return [
        [Choice(step * chance.randrange(9), chance.random()) for _ in range(chance.randrange(1, 5))]
        for _ in range(chance.randrange(1, 6))
    ]


def sums(choices: list[list[Choice]], picked: tuple[int, ...]) -> tuple[int, float]:
    """Cost and error of a choice for each item."""
    chosen = [item[index] for item, index in zip(choices, picked, strict=True)]
    return sum(one.cost for one in chosen), sum(one.error for one in chosen)


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_is_better(seed: int) -> None:
    chance = random.Random(seed)
    choices = items(chance, chance.choice((1, 96)))
    every = list(itertools.product(*(range(len(item)) for item in choices)))
    costs = sorted({sums(choices, picked)[0] for picked in every})
    for budget in (costs[0], chance.choice(costs), chance.choice(costs) + 1, costs[-1]):
        cost, error = sums(choices, tuple(allocate(choices, max(budget, costs[0]))))
        best = min(sums(choices, picked)[1] for picked in every if sums(choices, picked)[0] <= budget)
        assert cost <= budget and error == pytest.approx(best)


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="budget is 9 bytes, the least possible 10"):
        allocate([[Choice(10, 1.0), Choice(20, 0.0)]], 9)


def test_large_budgets_are_met_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "MOST_UNITS", 50)
    chance = random.Random(0)
    choices = [[Choice(chance.randrange(1, 10**6), chance.random()) for _ in range(4)] for _ in range(20)]
    budget = sum(sorted(one.cost for one in item)[1] for item in choices)
    cost, error = sums(choices, tuple(allocate(choices, budget)))
    least, _ = sums(choices, tuple(min(range(4), key=lambda i, item=item: item[i].cost) for item in choices))
    cheap = sums(choices, tuple(min(range(4), key=lambda i, item=item: item[i].cost) for item in choices))[1]
    assert least <= cost <= budget and error < cheap


@pytest.mark.parametrize("seed", range(10))
def test_what_is_left_goes_to_the_lowest_choices(seed: int) -> None:
    chance = random.Random(seed)
    choices = [[Choice(10 * bits, 0.0) for bits in (2, 3, 4)] for _ in range(6)]
    budget = chance.randrange(120, 240)
    found = widened(choices, allocate(choices, budget), budget)
    cost, _ = sums(choices, tuple(found))
    assert budget - 10 < cost <= budget and max(found) - min(found) <= 1
    started = [chance.randrange(3) for _ in choices]
    ended = widened(choices, started, 240)
    assert ended == [2] * 6 and widened(choices, started, 0) == started
