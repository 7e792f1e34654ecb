"""`quantpress eval`: its options, its files, and what it prints."""

import json
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cli import evaluate as command
from quantpress.cli import loading
from quantpress.errors import InvalidInputError
from quantpress.evaluation import evaluation, runner, suites
from quantpress.evaluation.arms import every_arm
from quantpress.evaluation.results import statistics
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
    """The tiny model in place of any other, and a tiny suite in place of the quick one."""
    asked = []
    monkeypatch.setitem(suites.SUITES, "quick", replace(suites.QUICK, **SIZES))
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    monkeypatch.setattr(loading, "load_pipeline", lambda *names: asked.append(names) or ours())
    return asked


@pytest.fixture
def few_arms(monkeypatch):
    """The uncompressed model and two controls."""
    monkeypatch.setattr(evaluation, "every_arm", lambda: every_arm()[:3])


def evaluate(*arguments):
    result = CliRunner().invoke(cli.app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_suite_writes_results_tables_and_pictures(tiny, tmp_path):
    own = "Knorm(0.2) | TurboQuant(bits=3)"
    printed = evaluate("--output", tmp_path, "-m", "m", "--device", "cpu", "--dtype", "float16", "-p", own)
    assert tiny == [("m", "cpu", "float16")]
    assert printed.strip() == (tmp_path / "report.md").read_text("utf-8").strip()
    for arm in every_arm():
        assert f"| {arm.name} |".replace(") | ", ") \\| ") in printed
    assert "| Knorm(0.2) \\| TurboQuant(bits=3) |" in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"results.jsonl", "report.md", "needles.png", "divergence.png", "memory.png", "front.png"}


@pytest.mark.usefixtures("few_arms")
def test_json_holds_every_row_and_a_second_run_adds_nothing(tiny, tmp_path):
    how = ("--output", tmp_path, "--part", "fidelity", "--no-figures", "--json")
    first = json.loads(evaluate(*how))
    size = (tmp_path / "results.jsonl").stat().st_size
    assert json.loads(evaluate(*how)) == first
    assert (tmp_path / "results.jsonl").stat().st_size == size
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "report.md"}
    assert [row["arm"] for row in first["fidelity"]] == [arm.name for arm in every_arm()[:3]]
    assert first["fidelity"][0]["kl"]["value"] < 1e-4
    assert first["settings"]["suite"]["context"] == 300
    assert first["grid"] == first["tasks"] == first["refused"] == []


@pytest.mark.usefixtures("few_arms")
def test_results_of_another_machine_are_reported_on(tiny, tmp_path):
    command.evaluate(output=tmp_path, part=["fidelity"], figures=False)
    written = (tmp_path / "report.md").read_text("utf-8")
    path, asked = tmp_path / "results.jsonl", len(tiny)
    path.write_text(path.read_text("utf-8").replace('"device": "cpu"', '"device": "a GPU"', 1), "utf-8")
    with pytest.raises(InvalidInputError, match="device"):
        command.evaluate(output=tmp_path, part=["fidelity"], figures=False)
    before = path.read_bytes()
    command.evaluate(output=tmp_path, report_only=True)
    assert (tmp_path / "report.md").read_text("utf-8") == written.replace("on cpu", "on a GPU")
    assert path.read_bytes() == before and (tmp_path / "divergence.png").exists()
    assert len(tiny) == asked + 1  # by the refused run, not by the report
    with pytest.raises(InvalidInputError, match="no file of results"):
        command.evaluate(output=tmp_path / "empty", report_only=True)
    assert not (tmp_path / "empty").exists()


def test_a_press_that_is_compared_anyway_is_refused(tiny, tmp_path):
    with pytest.raises(InvalidInputError, match="two arms"):
        command.evaluate(output=tmp_path, press=["SnapKV(0.5)"])
    assert not tiny


@pytest.mark.usefixtures("few_arms")
def test_the_two_ways_to_ask_never_meet_in_one_folder(tiny, tmp_path):
    how = ["--output", tmp_path, "--part", "tasks", "-p", "Knorm(0.5)", "--no-figures"]
    printed = evaluate(*how, "--question-aware")
    assert "## Tasks, with the question in view of the press" in printed
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["suite"]["question_aware"] and any(line.get("arm") == "Knorm(0.5)" for line in lines)
    with pytest.raises(InvalidInputError, match="holds results of other settings"):
        evaluate(*how)
    with pytest.raises(InvalidInputError, match="no effect on fidelity"):
        evaluate("--part", "fidelity", "--question-aware")


def test_missing_matplotlib_is_named_before_anything_is_measured(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidInputError, match="--no-figures"):
        command.evaluate(output=tmp_path)
    assert not tiny


@pytest.mark.usefixtures("few_arms")
def test_the_command_takes_its_options(tiny, tmp_path):
    options = (
        f"--suite full --model m --part fidelity -p Knorm --device cpu --dtype float32 --output {tmp_path}"
    )
    options += " --documents 1 --context 300 --continuation 5 --length 10 --length 20 --task-tokens 30"
    options += " --samples 2 --batch 4 --seed 5 --no-figures --json"
    found = json.loads(evaluate(*options.split()))
    assert tiny == [("m", "cpu", "float32")]
    settings = found["settings"]
    assert (
        settings["seed"] == 5
        and settings["suite"].items()
        >= {
            "name": "full",
            "documents": 1,
            "context": 300,
            "continuation": 5,
            "lengths": [10, 20],
            "task_tokens": 30,
            "samples": 2,
            "batch": 4,
        }.items()
    )
    assert "Knorm" in [row["arm"] for row in found["fidelity"]]


def test_without_options_every_part_is_measured(tiny, tmp_path, monkeypatch):
    parts = []
    monkeypatch.setattr(runner.Runner, "run", lambda self, some: parts.append((self.suite.name, tuple(some))))
    command.evaluate(output=tmp_path, figures=False)
    assert parts == [("quick", suites.PARTS)] and command.PARTS == suites.PARTS
