"""Intervals cover what they should, and the tests agree with closed forms."""

import math

import numpy as np
import pytest

from quantpress.errors import InvalidInputError
from quantpress.evaluation.results import statistics
from quantpress.evaluation.results.statistics import (
    Estimate,
    by_document,
    mcnemar,
    mean_by_document,
    mean_interval,
    paired_difference,
    paired_ratio,
)


def test_an_interval_of_means_is_the_normal_one(seed: int) -> None:
    values = np.random.default_rng(seed).normal(3.0, 2.0, 400)
    found = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_tokens_of_one_document_do_not_count_as_many(seed: int) -> None:
    """1000 equal tokens a document say no more than one: the interval is that of the documents."""
    chance = np.random.default_rng(seed)
    levels = chance.normal(0.0, 1.0, 12)
    pooled = mean_by_document([np.full(1000, level) for level in levels])
    alone = mean_interval(levels)
    assert (pooled.low, pooled.high) == pytest.approx((alone.low, alone.high))


def test_documents_weigh_by_their_tokens() -> None:
    assert by_document([[1.0] * 9, [11.0]], np.mean).value == 2.0
    assert by_document([[1.0] * 9, [11.0]], np.median).value == 1.0


def test_the_interval_covers_the_truth_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    chance = np.random.default_rng(0)
    found = [mean_interval(chance.normal(1.0, 1.0, 40)) for _ in range(150)]
    covered = sum(one.low <= 1.0 <= one.high for one in found)
    assert 0.88 * 150 <= covered <= 150


def test_the_same_data_give_the_same_interval() -> None:
    values = [0.1, 0.5, 0.7, 0.2]
    assert mean_interval(values) == mean_interval(values)


def test_means_are_those_of_the_general_way(seed: int) -> None:
    chance = np.random.default_rng(seed)
    documents = [chance.normal(size=n) for n in (3, 50, 7, 20, 11)]
    quick, slow = mean_by_document(documents), by_document(documents, np.mean)
    assert quick.value == pytest.approx(slow.value)
    assert (quick.low, quick.high) == pytest.approx((slow.low, slow.high), abs=0.05)
    assert quick.exp().high == pytest.approx(math.exp(quick.high))


def test_one_document_has_no_interval() -> None:
    assert by_document([[1.0, 2.0]], np.mean) == Estimate(1.5, None, None)


def test_pairs_are_compared_case_by_case() -> None:
    """Cases differ widely, pairs by exactly 0.1: the interval of the difference has no width."""
    reference = np.linspace(0, 100, 30)
    found = paired_difference(reference + 0.1, reference)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_ratio_is_of_means_and_keeps_pairs() -> None:
    """Documents differ widely, but each by the same factor: no resample changes the ratio of means."""
    values = np.geomspace(0.001, 10, 9)
    found = paired_ratio(values, 3 * values)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))
    found = paired_ratio([1.0, 1.0], [1.0, 3.0])
    assert (found.value, found.low, found.high) == (2, 1, 3)
    assert paired_ratio([1.0, 4.0], [10.0, 10.0]).value == 4  # not the mean of 10 and 2.5


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 1), (8, 8), (20, 5)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    both = 7
    reference = [True] * (lost + both) + [False] * (gained + 3)
    right = [False] * lost + [True] * (both + gained) + [False] * 3
    found = mcnemar(right, reference)
    n, k = lost + gained, max(lost, gained)
    tail = sum(math.comb(n, i) for i in range(k, n + 1)) / 2**n
    assert (found.lost, found.gained) == (lost, gained)
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


@pytest.mark.parametrize(
    "make",
    [
        lambda: by_document([], np.mean),
        lambda: by_document([[]], np.mean),
        lambda: paired_difference([1.0], [1.0, 2.0]),
        lambda: paired_ratio([1.0], [1.0, 2.0]),
        lambda: paired_ratio([], []),
        lambda: mcnemar([True], []),
    ],
)
def test_what_cannot_be_compared_is_refused(make) -> None:
    with pytest.raises(InvalidInputError):
        make()
