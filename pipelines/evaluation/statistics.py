"""Intervals and paired tests. scipy does the resampling and the exact tests.

Tokens of one document are not independent: intervals come from resampling whole documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, bootstrap

from quantpress.errors import InvalidInputError

RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 0

Numbers = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that covers it in 95 of 100 runs.

    Args:
        value: of all data.
        low, high: ends of the interval; None when there are fewer than two documents.
    """

    value: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """Plain values, for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


def by_document(documents: Sequence[Numbers], statistic: Callable[[NDArray[np.float64]], float]) -> Estimate:
    """A figure of pooled tokens, with a percentile bootstrap over documents.

    Args:
        documents: the numbers of each document.
        statistic: from all of them, pooled, to a figure.

    Raises:
        InvalidInputError: there is no number.

    Source: Efron and Tibshirani 1993, chapter 13; clusters resampled whole.

    Example:
        >>> by_document([[1.0, 3.0], [2.0, 2.0]], np.mean).value
        2.0
    """
    arrays = [np.asarray(one, dtype=np.float64) for one in documents if len(one)]
    if not arrays:
        raise InvalidInputError("no document has a number; score at least one token")
    value = float(statistic(np.concatenate(arrays)))
    if len(arrays) < 2:
        return Estimate(value, None, None)

    def pooled(index: NDArray[np.int64]) -> float:
        return float(statistic(np.concatenate([arrays[int(i)] for i in index])))

    low, high = _percentile_interval(np.arange(len(arrays)), pooled)
    return Estimate(value, low, high)


def mean_interval(values: Numbers) -> Estimate:
    """Mean of independent values, such as the scores of cases, with its percentile bootstrap interval.

    Raises:
        InvalidInputError: there is no value.
    """
    return by_document([[value] for value in values], np.mean)


def paired_difference(values: Numbers, reference: Numbers) -> Estimate:
    """Mean of values - reference over pairs, with its interval.

    Raises:
        InvalidInputError: the two differ in length, or are empty.
    """
    if len(values) != len(reference):
        raise InvalidInputError(
            f"{len(values)} values and {len(reference)} references cannot be paired; give one for each case"
        )
    return mean_interval(np.subtract(values, reference))


@dataclass(frozen=True)
class McNemar:
    """The exact test of whether two arms are right equally often on the same cases.

    Args:
        lost: cases that the reference has right and the arm wrong.
        gained: the other way round.
        p_value: two-sided; 1.0 when they never differ.
    """

    lost: int
    gained: int
    p_value: float


def mcnemar(right: Sequence[bool], reference: Sequence[bool]) -> McNemar:
    """McNemar's exact test: of the cases that differ, lost ones are binomial with one half.

    Raises:
        InvalidInputError: the two differ in length.

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


def _percentile_interval(
    index: NDArray[np.int64], statistic: Callable[[NDArray[np.int64]], float]
) -> tuple[float, float]:
    found = bootstrap(
        (index,),
        lambda sample: statistic(sample),
        vectorized=False,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(found.low), float(found.high)
