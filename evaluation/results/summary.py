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
"""A task on which the uncompressed model scores less is marked: it says little about a cache."""


@dataclass(frozen=True)
class FidelityRow:
    """One arm over all documents. Intervals come from resampling documents.

    Args:
        arm: its name.
        documents, tokens: how many, and how many tokens were scored in all.
        kl, kl_median, kl_p99: KL(uncompressed || compressed) in nats: mean, median, 99th percentile.
        agreement: part of the tokens on which both find the same token most likely.
        perplexity: of the continuations, over the compressed cache.
        perplexity_ratio: to the uncompressed model's, token by token.
        bits_per_value: resident bits over the numbers of all tokens read.
        resident_bytes: of one document's context, measured, the mean.
        ratio: bytes of all tokens read, uncompressed in the model's own dtype, over resident bytes.
        attention_error: |o' - o| / |o|, the mean over layers and heads, with the worst head's; None where
            attention was not compared.
        attention_kl: of the attention weights, in nats; None where tokens were evicted.
        seconds: for one document.
        budget: bytes allowed, as a part of all tokens' uncompressed; None outside the grid.
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
        arm: its name.
        cases: how many.
        scores: mean score of each task.
        mean: of all cases.
        difference: to the uncompressed cache, case by case.
        test: cases answered fully right, against the uncompressed cache's.
        ratio: uncompressed bytes over resident bytes, the mean over cases.
        seconds: for one case.
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
    """How much nearer to the uncompressed model an arm is than TurboQuant as published in as many bits.

    Args:
        arm, published: their names.
        bits, published_bits: bits a value, measured.
        ratio: mean KL as published over the arm's, document by document.
        net: the same less the KL of the uncompressed arm, which rounding makes; None where no more is left.
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
        fidelity, grid: of continuations, over the arms and over those of equal bytes.
        tasks: of answers.
        pairs: of the arms of `AGAINST_PUBLISHED`.
    """

    fidelity: list[FidelityRow]
    grid: list[FidelityRow]
    tasks: list[TaskRow]
    pairs: list[PairRow]

    @classmethod
    def of(cls, records: Records) -> "Findings":
        """What there are results for."""
        rows = fidelity_rows(records)
        return cls(rows, fidelity_rows(records, "grid"), task_rows(records), pair_rows(records, rows))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def fidelity_rows(records: Records, measure: str = "fidelity") -> list[FidelityRow]:
    """One row for each arm with results, in the order in which they came.

    Args:
        records: of a run.
        measure: "fidelity" or "grid".
    """
    return [_fidelity_row(arm, lines) for arm, lines in _by_arm(records, measure).items()]


def _fidelity_row(arm: str, lines: Sequence[Record]) -> FidelityRow:
    kl, nll = [line["kl"] for line in lines], [line["nll"] for line in lines]
    excess = [np.subtract(line["nll"], line["reference_nll"]) for line in lines]
    sizes = ("resident_bytes", "uncompressed_bytes", "numbers")
    resident, full, numbers = (float(np.mean([line[name] for line in lines])) for name in sizes)
    errors = [line["attention"] for line in lines if line.get("attention")]
    output = np.mean([one["output"] for one in errors], axis=0) if errors else None
    weights = [one["kl"] for one in errors]
    return FidelityRow(
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


def pair_rows(records: Records, rows: Sequence[FidelityRow]) -> list[PairRow]:
    """One row for each pair of `AGAINST_PUBLISHED` with results on the same documents.

    Args:
        records: of a run.
        rows: what `fidelity_rows` makes of them.
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
    """One row for each arm with answers, in the order in which they came."""
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
    """Tasks that the uncompressed model itself scores below `WEAK` on, and what it scores."""
    reference = next((row for row in rows if row.arm == UNCOMPRESSED), None)
    scores = reference.scores if reference is not None else {}
    return {task: score for task, score in scores.items() if score < WEAK}


def pareto_front(rows: Sequence[FidelityRow]) -> list[FidelityRow]:
    """The rows that no other beats in bytes and in divergence, from few bytes to many."""
    front: list[FidelityRow] = []
    for row in sorted(rows, key=lambda row: (row.resident_bytes, row.kl.value)):
        if not front or row.kl.value < front[-1].kl.value:
            front.append(row)
    return front


def _by_arm(records: Records, measure: str) -> dict[str, list[Record]]:
    arms: dict[str, list[Record]] = defaultdict(list)
    for line in records.of(measure):
        arms[line["arm"]].append(line)
    return dict(arms)
