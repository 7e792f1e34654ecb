"""The benchmark of plans: it compares within equal bytes, and a run goes on where it stopped."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.loading import benchmark
from tests.pipelines.words import ours, text


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    """benchmarks/fit.py as a module."""
    return benchmark("fit")


def test_plans_are_compared_within_the_bytes_of_one_width(
    fit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(fit, "load_pipeline", lambda *names: ours())
    monkeypatch.setattr(fit, "book_text", lambda: text(3000))
    words = ["--context", "300", "--pieces", "1", "--documents", "1", "--reference-pieces", "1"]
    words += ["--reference-widths", "2", "3", "4", "--trellis", "--by", "head"]
    written = tmp_path / "fit.json"
    monkeypatch.setattr(
        sys, "argv", ["fit.py", *words, "--work", str(tmp_path / "work"), "--json", str(written)]
    )
    fit.main()
    first = json.loads(written.read_text())
    for mean in fit.BUDGETS:
        base, *plans = [row for row in first["rows"] if row["mean"] == mean]
        assert base["ratio"]["value"] == 1.0 and len(plans) == 13
        assert sum(plan["widths"].startswith("trellis, ") for plan in plans) == 5
        assert sum(" by head" in plan["widths"] and plan["over_layers"]["value"] > 0 for plan in plans) == 6
        assert all(plan["bits_per_value"] <= base["bits_per_value"] for plan in plans)
    assert first["correlation"]["2"]["all"] > 0.5
    for name in ("estimate", "reference", "trellis", "scores"):
        assert (tmp_path / "work" / f"{name}.jsonl").stat().st_size
    for name in ("over", "kl_over"):
        monkeypatch.delattr(fit.DivergenceProbe, name)  # nothing is measured twice
    fit.main()
    again = json.loads(written.read_text())
    assert {**again, "seconds": 0} == {**first, "seconds": 0}
