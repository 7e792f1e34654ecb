"""`quantpress eval`: its options, its files, and what it prints."""

import json
import sys
from dataclasses import fields

import pytest
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cli import evaluate as command
from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import every_arm
from quantpress.evaluation.results import statistics
from quantpress.evaluation.suites import Suite
from tests.pipelines.words import ours

SIZES = {
    "documents": 2,
    "context": 300,
    "continuation": 5,
    "queries": 2,
    "lengths": (300,),
    "depths": (0.5,),
    "task_tokens": 300,
    "tasks": ("multi_key",),
    "grid_presses": ("Knorm",),
    "grid_bits": (16, 4),
    "grid_budgets": (1 / 2,),
}


@pytest.fixture
def tiny(monkeypatch):
    """The tiny model in place of any other."""
    asked = []
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    monkeypatch.setattr(command, "load_pipeline", lambda *names: asked.append(names) or ours())
    return asked


def test_a_suite_writes_results_tables_and_pictures(tiny, tmp_path, capsys):
    own = ["Knorm(0.2) | TurboQuant(bits=3)"]
    command.main("quick", tmp_path, model="m", device="d", dtype="t", presses=own, sizes=SIZES)
    assert tiny == [("m", "d", "t")]
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "report.md").read_text("utf-8").strip()
    for arm in every_arm():
        assert f"| {arm.name} |".replace(") | ", ") \\| ") in printed
    assert "| Knorm(0.2) \\| TurboQuant(bits=3) |" in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"results.jsonl", "report.md", "needles.png", "divergence.png", "memory.png", "front.png"}


def test_json_holds_every_row_and_a_second_run_adds_nothing(tiny, tmp_path, capsys):
    how = {"parts": ["fidelity"], "sizes": SIZES, "figures": False, "json": True}
    command.main("quick", tmp_path, **how)
    first = json.loads(capsys.readouterr().out)
    size = (tmp_path / "results.jsonl").stat().st_size
    command.main("quick", tmp_path, **how)
    assert json.loads(capsys.readouterr().out) == first
    assert (tmp_path / "results.jsonl").stat().st_size == size
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "report.md"}
    assert [row["arm"] for row in first["fidelity"]] == [arm.name for arm in every_arm()]
    assert first["fidelity"][0]["kl"]["value"] < 1e-4
    assert first["settings"]["suite"]["context"] == 300
    assert first["grid"] == first["tasks"] == first["refused"] == []


def test_results_of_another_machine_are_reported_on(tiny, tmp_path, capsys):
    command.main("quick", tmp_path, parts=["fidelity"], sizes=SIZES, figures=False)
    written = (tmp_path / "report.md").read_text("utf-8")
    path, asked = tmp_path / "results.jsonl", len(tiny)
    path.write_text(path.read_text("utf-8").replace('"device": "cpu"', '"device": "a GPU"', 1), "utf-8")
    with pytest.raises(InvalidInputError, match="device"):
        command.main("quick", tmp_path, parts=["fidelity"], sizes=SIZES, figures=False)
    before = path.read_bytes()
    command.main(output=tmp_path, report_only=True)
    assert (tmp_path / "report.md").read_text("utf-8") == written.replace("on cpu", "on a GPU")
    assert path.read_bytes() == before and (tmp_path / "divergence.png").exists()
    assert len(tiny) == asked + 1  # by the refused run, not by the report
    with pytest.raises(InvalidInputError, match="no file of results"):
        command.main(output=tmp_path / "empty", report_only=True)
    assert not (tmp_path / "empty").exists()


def test_a_press_that_there_is_not_is_named_at_once(tiny, tmp_path):
    with pytest.raises(InvalidInputError, match="did you mean 'SnapKV'"):
        command.main("quick", tmp_path, presses=["SnapKVV(0.5)"])
    with pytest.raises(InvalidInputError, match="two arms"):
        command.main("quick", tmp_path, presses=["SnapKV(0.5)"])
    assert not tiny


def test_a_part_that_there_is_not_is_refused(tiny, tmp_path):
    with pytest.raises(InvalidInputError, match="'speed'"):
        command.main("quick", tmp_path, parts=["speed"])
    assert not tiny


def test_missing_matplotlib_is_named_before_anything_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidInputError, match="--no-figures"):
        command.main("quick", tmp_path, sizes=SIZES)
    assert not tiny


@pytest.fixture
def called(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "main", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


def test_the_command_hands_its_options_on(called, tmp_path):
    options = [
        "--suite",
        "full",
        "--output",
        str(tmp_path),
        "--model",
        "m",
        "--part",
        "grid",
        "--part",
        "tasks",
    ]
    options += [
        "--press",
        "SnapKV",
        "-p",
        "Knorm | TurboQuant",
        "--device",
        "cuda",
        "--dtype",
        "float32",
        "--documents",
        "3",
        "--context",
        "99",
    ]
    options += ["--continuation", "7", "--length", "10", "--length", "20", "--task-tokens", "30"]
    options += ["--samples", "2", "--batch", "4", "--seed", "5", "--no-figures", "--json"]
    result = CliRunner().invoke(cli.app, ["eval", *options])
    assert result.exit_code == 0, result.output
    ((args, kwargs),) = called
    assert args == ("full", tmp_path)
    sizes = kwargs.pop("sizes")
    assert sizes == {
        "documents": 3,
        "context": 99,
        "continuation": 7,
        "lengths": (10, 20),
        "task_tokens": 30,
        "samples": 2,
        "batch": 4,
    }
    assert sizes.keys() <= {field.name for field in fields(Suite)}
    assert (kwargs["model"], kwargs["device"], kwargs["dtype"], kwargs["seed"]) == ("m", "cuda", "float32", 5)
    assert kwargs["parts"] == ["grid", "tasks"]
    assert kwargs["presses"] == ["SnapKV", "Knorm | TurboQuant"]
    assert (kwargs["figures"], kwargs["json"]) == (False, True)


def test_without_options_everything_is_measured(called):
    assert CliRunner().invoke(cli.app, ["eval"]).exit_code == 0
    ((args, kwargs),) = called
    assert args == ("quick", None)
    assert kwargs["parts"] == ["fidelity", "grid", "tasks"]
    assert kwargs["sizes"] == {}
