"""Benchmarks that run without a GPU: they measure what they say."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from quantpress.evaluation.divergence.documents import Document
from quantpress.evaluation.sizing.model_outline import outline
from quantpress.evaluation.suites import QUICK
from quantpress.evaluation.tasks.cases import Case
from quantpress.presses import TurboQuant
from quantpress.presses.expression import parse_press
from tests.benchmarks.loading import benchmark
from tests.pipelines.words import ours, text
from tests.tiny_models import prompt


@pytest.fixture(scope="module")
def defaults() -> ModuleType:
    """benchmarks/defaults.py as a module."""
    return benchmark("defaults")


def test_settings_are_presses_and_differ(defaults: ModuleType) -> None:
    presses = [parse_press(one) for one in defaults.every_setting()]
    assert all(isinstance(one, TurboQuant) for one in presses)
    assert len({repr(one) for one in presses}) == len(presses)


def test_the_table_compares_with_the_first_press_and_a_run_goes_on(
    defaults: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(defaults, "load_pipeline", lambda *names: ours())
    monkeypatch.setattr(defaults, "book_text", lambda: text(6000))
    monkeypatch.setattr(defaults, "outline", lambda model: outline("layers=3,kv_heads=2,head_dim=32"))
    monkeypatch.setattr(defaults, "SUITES", {"one": replace(QUICK, documents=3, context=300, continuation=9)})
    presses = ["TurboQuant(4, recent_tokens=8)", "TurboQuant(1, recent_tokens=8)"]
    words = ["defaults.py", "--context", "300", "--continuation", "9", "--documents", "2"]
    words += [word for press in presses for word in ("--press", press)]
    monkeypatch.setattr(sys, "argv", [*words, "--output", str(tmp_path)])
    defaults.main()
    first = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()[2:]]
    assert [row[0] for row in rows] == presses and rows[0][3] == "1.00 [1.00, 1.00]"
    kl = [float(row[2].split()[0]) for row in rows]
    assert float(rows[1][3].split()[0]) == pytest.approx(kl[1] / kl[0], rel=0.05) and kl[1] > 5 * kl[0]
    monkeypatch.delattr(defaults.DivergenceProbe, "over")
    defaults.main()
    assert capsys.readouterr().out == first


def test_a_press_sees_the_question_in_view_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view, pipe = benchmark("question_in_view"), ours(chat=True)
    asked = Case("needle", "one", text(300), " w1 w2", "w3", ("w4",), "recall", 2, 300)
    monkeypatch.setattr(view, "load_pipeline", lambda *names: pipe)
    monkeypatch.setattr(view, "needle", lambda tokenizer, tokens, seed, depth: replace(asked, name=str(seed)))
    written, press = tmp_path / "view.json", "TurboQuant(4, recent_tokens=8)"
    words = ["--cases", "2", "--press", press, "--output", str(tmp_path), "--json", str(written)]
    monkeypatch.setattr(sys, "argv", ["question_in_view.py", *words])
    view.main()
    first = json.loads(written.read_text())
    plain, packed = first["rows"]
    assert (plain["ratio"], packed["cache"], packed["cases"]) == (1.0, press, 2) and packed["ratio"] > 2
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()[1:]]
    read = {line["way"]: line["uncompressed_bytes"] for line in lines}
    given = pipe.preprocess(asked.context, questions=[asked.question], answer_prefix=asked.answer_prefix)
    seen, unseen = given["context_ids"].shape[1], given["questions_ids"][0].shape[1]
    assert read["in view"] * seen == read["blind"] * (seen + unseen - 1)
    more = ["--press", "Knorm({}) | TurboQuant(4, recent_tokens=8)", "--share", "0.3"]
    pieces = [Document("piece", prompt(428)[0], 300)]
    monkeypatch.setattr(view, "make_documents", lambda *sizes: pieces)
    monkeypatch.setattr(sys, "argv", ["question_in_view.py", *words, *more, "--documents", "1"])
    view.main()
    first = json.loads(written.read_text())
    kept = first["rows"][-1]
    assert kept["ratio"] == pytest.approx(1 / 0.3, rel=0.1) and 0 < first["rows"][1]["KL"] < kept["KL"]
    monkeypatch.delattr(view, "ask")  # nothing is asked twice
    monkeypatch.delattr(view, "DivergenceProbe")
    view.main()
    assert json.loads(written.read_text()) == first
    monkeypatch.setattr(sys, "argv", ["question_in_view.py", "--press", "SnapKV({})"])
    with pytest.raises(SystemExit):
        view.main()
    assert "needs --share" in capsys.readouterr().err
