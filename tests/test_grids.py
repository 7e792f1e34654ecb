"""Thinned grids keep every pair of values."""

from itertools import combinations, product

import pytest

from tests.grids import covering

PARAMETERS = ([1, 2, 3, 4, 8], ["key", "value"], [True, False], [64, 80, 128])


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_so_many_parameters_appears(strength: int) -> None:
    rows = covering(*PARAMETERS, strength=strength)
    for places in combinations(range(len(PARAMETERS)), strength):
        found = {tuple(row[place] for place in places) for row in rows}
        assert found == set(product(*(PARAMETERS[place] for place in places)))
    assert len(rows) < 60 and len(rows) == len(set(rows))


def test_rows_are_few_and_the_same_every_time() -> None:
    assert len(covering(*PARAMETERS, strength=1)) == 5
    assert len(covering(*PARAMETERS)) <= 18
    assert covering(*PARAMETERS) == covering(*PARAMETERS)
