"""What a layer can have where each KV head has widths of its own: the least error for each number of bytes.

Attention reads one group of heads with the same widths after the other, so a layer has at most `MOST_GROUPS`
groups. Within them, the choices are exact: for each set of as many pairs of widths, each head takes one of
the pairs, and dynamic programming over the heads finds the least sum of errors for each sum of bytes.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, product

import numpy as np

from quantpress.evaluation.fitting.allocation import Choice

MOST_GROUPS = 2
"""Groups of heads with the same widths in a layer."""

Pair = tuple[int, int]
"""Widths of the keys and the values of a head."""


def head_choices(
    errors: Sequence[Mapping[Pair, float]], costs: Mapping[Pair, int]
) -> list[tuple[Choice, tuple[Pair, ...]]]:
    """The choices for a layer, in at most `MOST_GROUPS` groups of heads.

    Args:
        errors: of each head, by pair of widths.
        costs: bytes of a head by pair of widths.

    Returns:
        Choices and the pair of each head, by rising bytes; none has a larger error than one of fewer bytes.

    Example:
        >>> head_choices([{(2, 2): 9.0, (4, 2): 1.0}, {(2, 2): 0.1, (4, 2): 0.0}], {(2, 2): 4, (4, 2): 6})[1]
        (Choice(cost=10, error=1.1), ((4, 2), (2, 2)))
    """
    pairs, heads = sorted(costs), len(errors)
    least = min(costs.values())
    unit = math.gcd(*(cost - least for cost in costs.values())) or 1
    steps = np.array([(costs[pair] - least) // unit for pair in pairs])
    sets = np.array(list(combinations(range(len(pairs)), min(MOST_GROUPS, len(pairs)))))  # [S, groups]
    best = np.full((len(sets), heads * int(steps.max()) + 1), np.inf)  # least error by set and steps so far
    best[:, 0] = 0.0
    taken = np.empty((heads, *best.shape), dtype=np.int8)  # which of its set the head takes
    column = np.arange(best.shape[1])
    for head, by_pair in enumerate(errors):
        own = np.array([by_pair[pair] for pair in pairs])
        before = column - steps[sets][..., None]  # [S, groups, steps]
        sums = np.take_along_axis(best[:, None], before.clip(min=0), axis=2) + own[sets][..., None]
        sums[before < 0] = np.inf
        taken[head], best = sums.argmin(axis=1), sums.min(axis=1)
    found: list[tuple[Choice, tuple[Pair, ...]]] = []
    for at, (row, error) in enumerate(zip(best.argmin(axis=0), best.min(axis=0), strict=True)):
        if error == np.inf or (found and error > found[-1][0].error):
            continue
        left, chosen = at, list[Pair]()
        for head in reversed(range(heads)):
            one = sets[row, taken[head, row, left]]
            chosen.append(pairs[one])
            left -= steps[one]
        found.append((Choice(heads * least + at * unit, float(error)), tuple(chosen[::-1])))
    return found


def pair_errors(
    keys: Mapping[int, Sequence[float]], values: Mapping[int, Sequence[float]]
) -> list[dict[Pair, float]]:
    """Errors of each head by pair of widths, from those of its keys and of its values by width."""
    heads = len(next(iter(keys.values())))
    return [
        {(k, v): keys[k][head] + values[v][head] for k, v in product(keys, values)} for head in range(heads)
    ]
