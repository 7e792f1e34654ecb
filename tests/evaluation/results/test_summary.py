"""Rows, tables and pictures say what the records say."""

import numpy as np
import pytest

from quantpress.evaluation.arms import AGAINST_PUBLISHED
from quantpress.evaluation.results import figures
from quantpress.evaluation.results.markdown import report
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.results.summary import (
    Findings,
    divergence_rows,
    pareto_front,
    task_rows,
    weak_tasks,
)

KL = {"uncompressed": [[0.0, 0.0], [0.0]], "small": [[0.1, 0.2], [0.6]], "smaller": [[0.3, 0.5], [1.0]]}
BYTES = {"uncompressed": 1600, "small": 400, "smaller": 200}


@pytest.fixture
def records(tmp_path):
    found = Records(tmp_path / "results.jsonl", {"model": "m", "dtype": "bfloat16", "suite": {"name": "s"}})
    for measure in ("fidelity", "grid"):
        for arm, documents in KL.items():
            for i, kl in enumerate(documents):
                found.add(
                    measure,
                    arm if measure == "fidelity" else f"Press, {arm}, 4 bits",
                    f"piece {i}",
                    kl=kl,
                    agree=[int(x < 0.4) for x in kl],
                    nll=[2 + x for x in kl],
                    reference_nll=[2.0] * len(kl),
                    resident_bytes=BYTES[arm],
                    uncompressed_bytes=1600,
                    numbers=800,
                    seconds=1.0,
                    attention={"layers": [0, 3], "output": [[0.1, 0.2], [0.3, 0.4]], "kl": None},
                )
    for arm, scores in {"uncompressed": [1.0, 1.0, 0.4], "small": [1.0, 0.0, 0.2]}.items():
        for i, (score, task) in enumerate(zip(scores, ("needle", "needle", "quote"), strict=True)):
            found.add(
                "tasks",
                arm,
                f"case {i}",
                task=task,
                tokens=1024 * (i + 1),
                depth=0.25 if task == "needle" else None,
                score=score,
                answer="",
                resident_bytes=BYTES[arm] * (i + 1),
                uncompressed_bytes=1600 * (i + 1),
                seconds=2.0,
            )
    found.add("refused", "wide | press", "fidelity", reason="too short")
    return found


def test_figures_of_continuations(records):
    rows = {row.arm: row for row in divergence_rows(records)}
    small = rows["small"]
    assert (small.documents, small.tokens) == (2, 3)
    assert small.kl.value == pytest.approx(0.3)
    assert small.kl_median.value == pytest.approx(0.2)
    assert small.kl_p99.value == pytest.approx(np.percentile([0.1, 0.2, 0.6], 99))
    assert small.agreement.value == pytest.approx(2 / 3)
    assert small.perplexity.value == pytest.approx(np.exp(2.3))
    assert small.perplexity_ratio.value == pytest.approx(np.exp(0.3))
    assert (small.bits_per_value, small.ratio) == (4.0, 4.0)
    assert small.attention_error == pytest.approx((0.25, 0.4))
    assert small.attention_kl is None
    assert 0.15 <= small.kl.low <= small.kl.value <= small.kl.high <= 0.6


def test_figures_of_tasks(records):
    reference, small = task_rows(records)
    assert reference.difference.value == 0
    assert small.scores == {"needle": 0.5, "quote": 0.2}
    assert small.mean.value == pytest.approx(0.4)
    assert small.difference.value == pytest.approx(-0.4)
    assert (small.test.lost, small.test.gained, small.test.p_value) == (1, 0, 1.0)
    assert small.ratio == 4.0
    assert weak_tasks([reference, small]) == {"quote": pytest.approx(0.4)}


def test_arms_are_compared_with_turboquant_as_published(tmp_path):
    found = Records(tmp_path / "results.jsonl", {})
    arm, published = "preset small", AGAINST_PUBLISHED["preset small"]
    fixed = {"agree": [1], "nll": [2.0], "reference_nll": [2.0], "seconds": 1.0, "attention": None}
    size = {"uncompressed_bytes": 16, "numbers": 8}
    kl = {"uncompressed": [1.0, 1.0, 9.0], arm: [2.0, 4.0, 9.0], published: [5.0, 7.0]}
    for name, documents in kl.items():
        for i, one in enumerate(documents):
            found.add("fidelity", name, f"piece {i}", kl=[one], resident_bytes=4, **size, **fixed)
    (row,) = Findings.of(found).pairs
    assert (row.arm, row.published, row.bits) == (arm, published, 4.0)
    assert (row.ratio.value, row.net.value) == (2.0, 2.5)  # of the two documents that both have
    assert (
        "| preset small | 4.00 | as published 3/3 | 4.00 | 2.00 [1.75, 2.50] | 2.50 [2.00, 4.00] |"
        in report(found, Findings.of(found))
    )
    found.add("fidelity", published, "piece 2", kl=[20.0], resident_bytes=4, **size, **fixed)
    assert Findings.of(found).pairs[0].net is None


def test_bytes_off_the_budget_are_told(records):
    fixed = {"agree": [1], "nll": [2.0], "reference_nll": [2.0], "seconds": 1.0, "attention": None}
    for name, part in {"near": 0.2485, "under": 0.24, "over": 0.26}.items():
        size = {"resident_bytes": 1e6 * part, "uncompressed_bytes": 1e6, "numbers": 5e5, "budget": 0.25}
        records.add("grid", f"{name}, 4 bits", "piece 0", kl=[0.1], **size, **fixed)
    told = "1% over or under the bytes of the budget: under, 4 bits -4.0%, over, 4 bits +4.0%."
    assert told in report(records, Findings.of(records))


def test_the_front_is_what_nothing_beats(records, seed):
    chance = np.random.default_rng(seed)
    fixed = {"agree": [1], "nll": [2.0], "reference_nll": [2.0], "seconds": 1.0, "attention": None}
    for i in range(40):
        size, kl = int(chance.integers(1, 20)) * 100, float(chance.integers(1, 20)) / 10
        figures = {"kl": [kl], "resident_bytes": size, "uncompressed_bytes": 1600, "numbers": 800}
        records.add("grid", f"Press, {i} tokens, 2 bits", "piece 0", **figures, **fixed)
    rows = divergence_rows(records, "grid")
    points = {(row.resident_bytes, row.kl.value) for row in rows}
    best = {
        (size, kl)
        for size, kl in points
        if not any((s <= size and k <= kl and (s, k) != (size, kl)) for s, k in points)
    }
    assert {(row.resident_bytes, row.kl.value) for row in pareto_front(rows)} == best


def test_the_page_shows_every_arm_and_marks_what_is_weak(records):
    page = report(records, Findings.of(records))
    table_lines = [line.replace("\\|", "") for line in page.splitlines() if line.startswith("|")]
    assert all("4.00x" in line for line in table_lines if line.startswith("| small |"))
    assert "| 0.3000 [" in page
    assert "quote †" in page
    assert "quote 0.40" in page
    assert "- wide | press, fidelity: too short" in page
    assert "**Press, smaller, 4 bits**" in page
    assert {line.count("|") for line in table_lines} == {12, 8, 10}  # fidelity, grid, tasks


def test_pictures_show_the_figures(records, tmp_path):
    shown = figures.needle_map(records)
    images = [axes.images[0].get_array() for axes in shown.axes]
    assert [image.tolist() for image in images] == [[[1.0, 1.0]], [[1.0, 0.0]]]
    lines = figures.memory_plot(records).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [
        [1600 / 2**20, 3200 / 2**20],
        [400 / 2**20, 800 / 2**20],
    ]
    front = figures.front_plot(divergence_rows(records, "grid")).axes[0].lines[-1]
    assert list(front.get_xdata()) == [0.125, 0.25, 1.0]
    attention = figures.attention_plot(records).axes[0].lines[0]
    assert list(attention.get_xdata()) == [0, 3]
    assert attention.get_ydata() == pytest.approx([0.15, 0.35])
    written = figures.write_figures(records, Findings.of(records), tmp_path)
    assert sorted(path.name for path in written) == [
        "attention.png", "divergence.png", "front.png", "memory.png", "needles.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_without_results_there_are_no_pictures(tmp_path):
    empty = Records(tmp_path / "results.jsonl", {})
    assert figures.write_figures(empty, Findings.of(empty), tmp_path) == []
    assert report(empty, Findings.of(empty)).startswith("# Evaluation")
