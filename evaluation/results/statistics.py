"""Intervals and paired tests, by scipy's resampling and exact tests.

Tokens of one document are not independent, so intervals come from resampling whole documents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

from quantpress.errors import InvalidInputError

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0

Numbers = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % confidence interval; formatting it writes both.

    Args:
        value: the figure over all data.
        low, high: ends of the interval; None when there are fewer than two documents.

    Example:
        >>> f"{Estimate(0.25, 0.2, 0.3):.2f}", f"{Estimate(0.25, None, None):.2f}"
        ('0.25 [0.20, 0.30]', '0.25')
    """

    value: float
    low: float | None
    high: float | None

    def __format__(self, spec: str) -> str:
        shown = format(self.value, spec)
        return shown if self.low is None else f"{shown} [{self.low:{spec}}, {self.high:{spec}}]"

    def exp(self) -> "Estimate":
        """The estimate of the figure's exponential; percentile intervals transform with it."""
        ends = [None if end is None else math.exp(end) for end in (self.low, self.high)]
        return Estimate(math.exp(self.value), *ends)


def by_document(documents: Sequence[Numbers], statistic: Callable[[NDArray[np.float64]], float]) -> Estimate:
    """A figure of pooled tokens, with a percentile bootstrap over documents.

    Args:
        documents: the numbers of each document.
        statistic: computes the figure from all numbers, pooled.

    Raises:
        InvalidInputError: no document has a number.

    Source: Efron and Tibshirani 1993, chapter 13; clusters resampled whole.

    Example:
        >>> by_document([[1.0, 3.0], [2.0, 2.0]], np.median).value
        2.0
    """
    arrays = _filled(documents)

    def pooled(index: NDArray[np.int64]) -> float:
        return float(statistic(np.concatenate([arrays[int(i)] for i in index])))

    every = np.arange(len(arrays))
    return _estimate(pooled(every), (every,), pooled, vectorized=False)


def mean_by_document(documents: Sequence[Numbers]) -> Estimate:
    """The mean of pooled tokens: `by_document(documents, np.mean)`, but much faster.

    Raises:
        InvalidInputError: no document has a number.

    Example:
        >>> mean_by_document([[1.0] * 9, [11.0]]).value
        2.0
    """
    arrays = _filled(documents)
    sums, counts = (np.array([f(one) for one in arrays], dtype=np.float64) for f in (np.sum, np.size))

    def ratio(sums: NDArray[np.float64], counts: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        total: NDArray[np.float64] = sums.sum(axis) / counts.sum(axis)
        return total

    return _estimate(float(ratio(sums, counts)), (sums, counts), ratio, vectorized=True)


def mean_interval(values: Numbers) -> Estimate:
    """Mean of independent values, such as the scores of cases, with its percentile bootstrap interval.

    Raises:
        InvalidInputError: there is no value.
    """
    return mean_by_document([[value] for value in values])


def paired_difference(values: Numbers, reference: Numbers) -> Estimate:
    """Mean of values - reference over pairs, with its interval.

    Raises:
        InvalidInputError: `values` and `reference` differ in length, or are empty.
    """
    ours, theirs = _paired(values, reference)
    return mean_interval(ours - theirs)


def paired_ratio(values: Numbers, reference: Numbers) -> Estimate:
    """Mean of the reference over the mean of the values, pairs resampled together.

    Args:
        values: one value for each document.
        reference: values of the same documents.

    Raises:
        InvalidInputError: `values` and `reference` differ in length, or are empty.

    Example:
        >>> paired_ratio([1.0, 2.0], [2.0, 4.0])
        Estimate(value=2.0, low=2.0, high=2.0)
    """
    pair = _paired(values, reference)

    def ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
        found: NDArray[np.float64] = theirs.mean(axis) / ours.mean(axis)
        return found

    return _estimate(float(ratio(*pair)), pair, ratio, vectorized=True)


@dataclass(frozen=True)
class McNemar:
    """The exact test of whether two arms are right equally often on the same cases.

    Args:
        lost: cases that the reference gets right and the arm wrong.
        gained: cases that the arm gets right and the reference wrong.
        p_value: two-sided p-value; 1.0 when they never differ.
    """

    lost: int
    gained: int
    p_value: float


def mcnemar(right: Sequence[bool], reference: Sequence[bool]) -> McNemar:
    """McNemar's exact test: among the cases that differ, lost ones are binomial with p = 1/2.

    Raises:
        InvalidInputError: `right` and `reference` differ in length.

    Source: McNemar 1947; scipy's binomtest.

    Example:
        >>> mcnemar([False] * 6, [True] * 6)
        McNemar(lost=6, gained=0, p_value=0.03125)
    """
    if len(right) != len(reference):
        raise InvalidInputError(
            f"{len(right)} answers and {len(reference)} references cannot be paired; give one for each case"
        )
    pairs = list(zip(right, reference, strict=True))
    lost = sum(not ours and theirs for ours, theirs in pairs)
    gained = sum(ours and not theirs for ours, theirs in pairs)
    differing = lost + gained
    return McNemar(lost, gained, float(binomtest(lost, differing).pvalue) if differing else 1.0)


def _paired(values: Numbers, reference: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(values) != len(reference) or not len(values):
        raise InvalidInputError(
            f"{len(values)} values and {len(reference)} references cannot be paired; give one for each case"
        )
    return np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)


def _filled(documents: Sequence[Numbers]) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(one, dtype=np.float64) for one in documents if len(one)]
    if not arrays:
        raise InvalidInputError("no document has a number; score at least one token")
    return arrays


def _estimate(
    value: float, data: tuple[NDArray[Any], ...], statistic: Callable[..., Any], *, vectorized: bool
) -> Estimate:
    """A figure, with its interval when there are two or more documents to resample."""
    if len(data[0]) < 2:
        return Estimate(value, None, None)
    found = bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=vectorized,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))
