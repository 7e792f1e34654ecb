"""From records to figures with intervals: one row for each arm."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from quantpress.evaluation.arms import AGAINST_PUBLISHED, UNCOMPRESSED
from quantpress.evaluation.results.records import Record, Records
from quantpress.evaluation.results.statistics import (
    Estimate,
    McNemar,
    by_document,
    mcnemar,
    mean_by_document,
    mean_interval,
    paired_difference,
    paired_ratio,
)

WEAK = 0.5
"""Tasks on which the uncompressed model scores less are marked: they say little about a cache."""


@dataclass(frozen=True)
class DivergenceRow:
    """One arm over all documents. Intervals come from resampling documents.

    Args:
        arm: name of the arm.
        documents, tokens: number of documents, and of tokens scored in all of them.
        kl, kl_median, kl_p99: KL(uncompressed || compressed) in nats: mean, median, 99th percentile.
        agreement: share of the tokens on which both find the same token most likely.
        perplexity: perplexity of the continuations over the compressed cache.
        perplexity_ratio: perplexity over the uncompressed model's, token by token.
        bits_per_value: resident bits over the numbers of all tokens read.
        resident_bytes: measured bytes of one document's context, the mean.
        ratio: bytes of all tokens read, uncompressed in the model's own dtype, over resident bytes.
        attention_error: |o' - o| / |o|, mean over layers and heads, and of the worst head; None where
            attention was not compared.
        attention_kl: KL of the attention weights in nats; None where tokens were evicted.
        seconds: time for one document.
        budget: bytes allowed, as a share of all tokens uncompressed; None outside the grid.
    """

    arm: str
    documents: int
    tokens: int
    kl: Estimate
    kl_median: Estimate
    kl_p99: Estimate
    agreement: Estimate
    perplexity: Estimate
    perplexity_ratio: Estimate
    bits_per_value: float
    resident_bytes: float
    ratio: float
    attention_error: tuple[float, float] | None
    attention_kl: float | None
    seconds: float
    budget: float | None = None


@dataclass(frozen=True)
class TaskRow:
    """One arm over all cases that it and the uncompressed cache have answered.

    Args:
        arm: name of the arm.
        cases: number of cases.
        scores: mean score of each task.
        mean: mean score of all cases.
        difference: difference to the uncompressed cache, case by case.
        test: McNemar's test of the cases answered fully right, against the uncompressed cache.
        ratio: uncompressed bytes over resident bytes, mean over cases.
        seconds: time for one case.
    """

    arm: str
    cases: int
    scores: dict[str, float]
    mean: Estimate
    difference: Estimate
    test: McNemar
    ratio: float
    seconds: float


@dataclass(frozen=True)
class PairRow:
    """How much nearer to the uncompressed model an arm is than TurboQuant as published at the same bits.

    Args:
        arm, published: names of the two arms.
        bits, published_bits: their measured bits a value.
        ratio: mean KL as published over the arm's, document by document.
        net: the same after subtracting the KL of the uncompressed arm, which is rounding; None where nothing
            is left of the arm's.
    """

    arm: str
    published: str
    bits: float
    published_bits: float
    ratio: Estimate
    net: Estimate | None


@dataclass(frozen=True)
class Findings:
    """All rows of a run.

    Args:
        fidelity, grid: divergence of continuations, over the arms and over the arms of equal bytes.
        tasks: scores of answers.
        pairs: the pairs of `AGAINST_PUBLISHED`.
    """

    fidelity: list[DivergenceRow]
    grid: list[DivergenceRow]
    tasks: list[TaskRow]
    pairs: list[PairRow]

    @classmethod
    def of(cls, records: Records) -> "Findings":
        """Summarize what there are results for."""
        rows = divergence_rows(records)
        return cls(rows, divergence_rows(records, "grid"), task_rows(records), pair_rows(records, rows))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def divergence_rows(records: Records, measure: str = "fidelity") -> list[DivergenceRow]:
    """One row for each arm with results, in the order of the records.

    Args:
        records: records of a run.
        measure: "fidelity" or "grid".
    """
    return [_divergence_row(arm, lines) for arm, lines in _by_arm(records, measure).items()]


def _divergence_row(arm: str, lines: Sequence[Record]) -> DivergenceRow:
    kl, nll = [line["kl"] for line in lines], [line["nll"] for line in lines]
    excess = [np.subtract(line["nll"], line["reference_nll"]) for line in lines]
    sizes = ("resident_bytes", "uncompressed_bytes", "numbers")
    resident, full, numbers = (float(np.mean([line[name] for line in lines])) for name in sizes)
    errors = [line["attention"] for line in lines if line.get("attention")]
    output = np.mean([one["output"] for one in errors], axis=0) if errors else None
    weights = [one["kl"] for one in errors]
    return DivergenceRow(
        arm=arm,
        documents=len(lines),
        tokens=sum(map(len, kl)),
        kl=mean_by_document(kl),
        kl_median=by_document(kl, np.median),
        kl_p99=by_document(kl, lambda pooled: float(np.percentile(pooled, 99))),
        agreement=mean_by_document([line["agree"] for line in lines]),
        perplexity=mean_by_document(nll).exp(),
        perplexity_ratio=mean_by_document(excess).exp(),
        bits_per_value=8 * resident / numbers,
        resident_bytes=resident,
        ratio=full / resident,
        attention_error=None if output is None else (float(output.mean()), float(output.max())),
        attention_kl=float(np.mean(weights)) if weights and None not in weights else None,
        seconds=float(np.mean([line["seconds"] for line in lines])),
        budget=lines[0].get("budget"),
    )


def pair_rows(records: Records, rows: Sequence[DivergenceRow]) -> list[PairRow]:
    """One row for each pair of `AGAINST_PUBLISHED` with results on the same documents.

    Args:
        records: records of a run.
        rows: what `divergence_rows` makes of them.
    """
    kl: dict[str, dict[str, float]] = defaultdict(dict)
    for line in records.of("fidelity"):
        kl[line["arm"]][line["case"]] = float(np.mean(line["kl"]))
    bits = {row.arm: row.bits_per_value for row in rows}
    found = []
    for arm, published in AGAINST_PUBLISHED.items():
        cases = [case for case in kl[arm] if case in kl[published] and case in kl[UNCOMPRESSED]]
        if cases:
            ours, theirs, floor = (
                np.array([kl[name][case] for case in cases]) for name in (arm, published, UNCOMPRESSED)
            )
            net = paired_ratio(ours - floor, theirs - floor) if (ours > floor).all() else None
            figures = bits[arm], bits[published], paired_ratio(ours, theirs), net
            found.append(PairRow(arm, published, *figures))
    return found


def task_rows(records: Records) -> list[TaskRow]:
    """One row for each arm with answers, in the order of the records."""
    arms = _by_arm(records, "tasks")
    reference = {line["case"]: line for line in arms.get(UNCOMPRESSED, ())}
    rows = []
    for arm, lines in arms.items():
        pairs = [(line, reference[line["case"]]) for line in lines if line["case"] in reference]
        if pairs:
            rows.append(_task_row(arm, pairs))
    return rows


def _task_row(arm: str, pairs: Sequence[tuple[Record, Record]]) -> TaskRow:
    by_task: dict[str, list[float]] = defaultdict(list)
    for line, _ in pairs:
        by_task[line["task"]].append(line["score"])
    ours, theirs = ([pair[side]["score"] for pair in pairs] for side in (0, 1))
    return TaskRow(
        arm=arm,
        cases=len(pairs),
        scores={task: float(np.mean(scores)) for task, scores in by_task.items()},
        mean=mean_interval(ours),
        difference=paired_difference(ours, theirs),
        test=mcnemar([one == 1 for one in ours], [one == 1 for one in theirs]),
        ratio=float(np.mean([line["uncompressed_bytes"] / line["resident_bytes"] for line, _ in pairs])),
        seconds=float(np.mean([line["seconds"] for line, _ in pairs])),
    )


def weak_tasks(rows: Sequence[TaskRow]) -> dict[str, float]:
    """Tasks on which the uncompressed model itself scores below `WEAK`, with its scores."""
    reference = next((row for row in rows if row.arm == UNCOMPRESSED), None)
    scores = reference.scores if reference is not None else {}
    return {task: score for task, score in scores.items() if score < WEAK}


def pareto_front(rows: Sequence[DivergenceRow]) -> list[DivergenceRow]:
    """The rows that no other row beats in both bytes and divergence, from few bytes to many."""
    front: list[DivergenceRow] = []
    for row in sorted(rows, key=lambda row: (row.resident_bytes, row.kl.value)):
        if not front or row.kl.value < front[-1].kl.value:
            front.append(row)
    return front


def _by_arm(records: Records, measure: str) -> dict[str, list[Record]]:
    arms: dict[str, list[Record]] = defaultdict(list)
    for line in records.of(measure):
        arms[line["arm"]].append(line)
    return dict(arms)
