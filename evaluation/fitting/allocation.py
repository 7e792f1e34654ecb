"""The choices of least error within a number of bytes: a knapsack, one choice for each item, solved exactly.

>>> allocate([[Choice(2, 9.0), Choice(4, 1.0)], [Choice(2, 5.0), Choice(4, 4.0)]], budget=6)
[1, 0]
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from quantpress.errors import InvalidInputError

MOST_UNITS = 1 << 16
"""Steps that the budget is divided into at most. Beyond, costs are rounded up to steps: the budget still
holds, and the errors may be a little above the least possible."""


@dataclass(frozen=True)
class Choice:
    """One of the choices for an item.

    Args:
        cost: bytes, 0 or more.
        error: what is added to the sum to be kept small.
    """

    cost: int
    error: float


def allocate(items: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """Choose once for each item, so that the sum of errors is least and the costs fit the budget.

    Args:
        items: the choices for each item.
        budget: most bytes of all items together.

    Returns:
        The index of the choice for each item. Of equal sums the cheapest.

    Raises:
        InvalidInputError: not even the cheapest choices fit.
    """
    least = [min(choice.cost for choice in item) for item in items]
    spare = budget - sum(least)
    if spare < 0:
        raise InvalidInputError(f"the budget is {budget:,} bytes, the least possible {sum(least):,}")
    extra = [[choice.cost - low for choice in item] for item, low in zip(items, least, strict=True)]
    unit = math.gcd(*chain.from_iterable(extra)) or 1
    spare = min(spare, sum(map(max, extra)))
    if spare // unit > MOST_UNITS:
        unit = -(-spare // MOST_UNITS)
    units = spare // unit
    best = np.zeros(units + 1)  # least error with at most so many units
    chosen = np.empty((len(items), units + 1), dtype=np.int16)
    steps = [[-(-cost // unit) for cost in item] for item in extra]
    for row, (item, costs) in enumerate(zip(items, steps, strict=True)):
        sums = np.full((len(item), units + 1), np.inf)
        for index, (choice, cost) in enumerate(zip(item, costs, strict=True)):
            if cost <= units:
                sums[index, cost:] = best[: units + 1 - cost] + choice.error
        chosen[row] = sums.argmin(axis=0)
        best = sums.min(axis=0)
    left = int(np.flatnonzero(best == best[-1])[0])
    found = []
    for row in reversed(range(len(items))):
        found.append(int(chosen[row, left]))
        left -= steps[row][found[-1]]
    return found[::-1]


def widened(items: Sequence[Sequence[Choice]], chosen: Sequence[int], budget: int) -> list[int]:
    """Spend what a choice leaves of the budget: the lowest choice goes one up for as long as one fits.

    Args:
        items: the choices for each item, cheapest first.
        chosen: the index of the choice for each item.
        budget: most bytes of all items together.

    Returns:
        The index of the choice for each item.

    >>> widened([[Choice(2, 0.0), Choice(4, 0.0)], [Choice(2, 9.0), Choice(4, 1.0)]], [0, 1], budget=9)
    [1, 1]
    """
    found = list(chosen)
    spare = budget - sum(item[index].cost for item, index in zip(items, found, strict=True))
    for row in _lowest_first(items, found):
        cost = items[row][found[row] + 1].cost - items[row][found[row]].cost
        if cost <= spare:
            found[row], spare = found[row] + 1, spare - cost
    return found


def _lowest_first(items: Sequence[Sequence[Choice]], found: Sequence[int]) -> Iterator[int]:
    """Every item once for each step that it can still go up, those at lower choices before the others."""
    for index in range(max(map(len, items))):
        for row, item in enumerate(items):
            if found[row] == index < len(item) - 1:
                yield row
