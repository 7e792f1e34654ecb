"""Few cases in place of all combinations, where parameters do not act together."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def covering(*parameters: Sequence[Any], strength: int = 2) -> list[tuple[Any, ...]]:
    """Rows of one value for each parameter, such that all combinations of any `strength` parameters appear.

    Greedy: each next row covers as much as a row can, with the values used least so far. No chance is in it.
    """
    places = list(combinations(range(len(parameters)), strength))

    def covered(row: tuple[Any, ...]) -> set[Any]:
        return {(at, tuple(row[place] for place in at)) for at in places}

    indices = list(product(*(range(len(values)) for values in parameters)))
    missing, rows = set().union(*map(covered, indices)), list[tuple[int, ...]]()
    used: Counter[tuple[int, int]] = Counter()
    while missing:
        gains = {row: len(covered(row) & missing) for row in indices}
        best = max(gains.values())
        rest = (row for row, gain in gains.items() if gain == best)
        rows.append(min(rest, key=lambda row: sum(used[one] for one in enumerate(row))))
        used.update(enumerate(rows[-1]))
        missing -= covered(rows[-1])
    return [tuple(values[at] for values, at in zip(parameters, row, strict=True)) for row in rows]
