"""`quantpress batch --address local`, on a Ray cluster of this machine: `make test-ray`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from quantpress import cli
from tests.limits import HANG
from tests.pipelines.words import model_folder, text

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed here: make test-ray")

COUNT = 200
POISON = """
import os
from quantpress.presses import ScorerPress

class Poison(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        if keys.shape[2] == 78:  # tokens of one of the documents
            os.kill(os.getpid(), 9)
        return keys.norm(dim=-1)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, 200 small documents and two questions."""
    made = tmp_path_factory.mktemp("batch")
    model_folder(made / "model")
    for index in range(COUNT):
        path = made / "documents" / f"{index % 7}" / f"{index}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(200 + index, seed=index), encoding="utf-8")
    (made / "questions.txt").write_text("w1 w2\nw7\n", encoding="utf-8")
    return made


def command(out: str, *options: str, documents: str = "documents") -> list[str]:
    whole = ["batch", documents, "--questions", "questions.txt", "--out", out, "--max-new-tokens", "3"]
    return [*whole, "-m", "model", "--device", "cpu", "-p", "Knorm(0.3) | TurboQuant", "--json", *options]


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts the command in a process of its own, with one worker on each of two cores."""
    started: list[subprocess.Popen[str]] = []

    def run(out: str, *options: str, **rest: str) -> "subprocess.Popen[str]":
        words = command(out, "--address", "local", "--cores", "1", *options, **rest)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quantpress", *words],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=HANG)


def finished(process: "subprocess.Popen[str]", status: int = 0) -> tuple[Any, str]:
    """The outcome of the command, and what it said on stderr."""
    stdout, stderr = process.communicate(timeout=HANG)
    assert process.returncode == status and "Traceback" not in stderr, stderr
    return json.loads(stdout or "null"), stderr


def wait_for_lines(process: "subprocess.Popen[str]", file: Path, count: int) -> None:
    end = time.monotonic() + HANG
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{file} has no {count} lines: {process.communicate() if process.poll() else ''}")


def answers(file: Path) -> dict[str, list[str]]:
    """The answers by document, none of which is there twice."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    named = {line["document"]: [one["answer"] for one in line["answers"]] for line in found}
    assert len(named) == len(found)
    return named


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[str]]:
    """The answers of one process without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = CliRunner().invoke(cli.app, command("sequential.jsonl"), catch_exceptions=False)
    assert json.loads(result.stdout)["answered"] == COUNT
    return answers(folder / "sequential.jsonl")


def processes_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=240)
    return not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_is_killed_and_nothing_is_lost(
    folder: Path, expected: dict[str, list[str]], start: Start
) -> None:
    """All 200 answers are there once, those of one process, and no process of Ray is left."""
    out = folder / "killed_worker.jsonl"
    process = start(out.name)
    wait_for_lines(process, out, 20)
    everyone = processes_of(process)
    named = {one: " ".join(one.cmdline()) for one in everyone}
    reporters = [one for one, words in named.items() if "dashboard.py" in words]  # sends usage statistics
    assert all(one.environ()["RAY_USAGE_STATS_ENABLED"] == "0" for one in reporters)
    workers = [one for one, words in named.items() if "ray::Worker" in words]
    assert len(workers) == 2
    workers[0].kill()
    found, _ = finished(process)
    assert (found["answered"], found["failed"]) == (COUNT, 0)
    assert answers(out) == expected
    assert gone(everyone)


def test_the_driver_is_killed_and_the_run_resumed(
    folder: Path, expected: dict[str, list[str]], start: Start
) -> None:
    """Workers share a store, from which a third run takes every context."""
    out = folder / "killed_driver.jsonl"
    process = start(out.name, "--store", "contexts")
    wait_for_lines(process, out, 20)
    everyone = processes_of(process)
    process.kill()
    process.communicate(timeout=HANG)
    complete = out.read_bytes().count(b"\n")
    found, _ = finished(start(out.name, "--store", "contexts"))
    assert (found["answered"], found["answered_before"]) == (COUNT - complete, complete)
    assert answers(out) == expected and complete < COUNT
    assert gone(everyone)  # Ray notices by itself that the first driver is gone
    again, _ = finished(start("again.jsonl", "--store", "contexts"))
    assert again["from_store"] == COUNT
    assert answers(folder / "again.jsonl") == expected


def test_a_document_that_kills_its_workers_fails_alone(folder: Path, start: Start) -> None:
    (folder / "poison.py").write_text(POISON)
    (folder / "few").mkdir()
    for index, tokens in enumerate((60, 77, 70, 65)):
        (folder / "few" / f"{index}.txt").write_text(text(tokens, seed=index))
    found, said = finished(start("few.jsonl", "-p", "poison:Poison(0.5)", documents="few"), status=1)
    assert found["answered"] == 3 and [one["document"] for one in found["failures"]] == ["1.txt"]
    assert "3 workers died over it" in found["failures"][0]["reason"] and "1.txt failed" in said
    assert set(answers(folder / "few.jsonl")) == {"0.txt", "2.txt", "3.txt"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--address", "127.0.0.1:1"], "there is no Ray cluster at --address 127.0.0.1:1"),
        (["-m", "nowhere/to-be-found"], "nowhere/to-be-found cannot be loaded"),
        (["--cores", "4000"], "no machine of the cluster has 4000 free cores"),
    ],
    ids=["cluster", "model", "cores"],
)
def test_what_cannot_work_is_one_line(options: list[str], said: str, start: Start) -> None:
    _, found = finished(start("none.jsonl", *options), status=2)
    assert said in found
