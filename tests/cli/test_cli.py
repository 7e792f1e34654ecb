"""The command line itself: help, options, exit status, what goes where."""

import json
import os
import shlex
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import quantpress
from quantpress import cli
from quantpress.cli import doctor, loading
from quantpress.cli.engines import vllm_here
from quantpress.evaluation import demo
from quantpress.evaluation.demo import Row, Trial
from quantpress.evaluation.tasks.haystack import Needle
from quantpress.pipelines.report import Report
from tests.limits import HANG
from tests.pipelines.words import ours

ROOT = Path(__file__).parents[2]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Tokens and number of presses of each demo, which asks nothing and fails when asked for 8000 tokens."""
    calls: list[tuple[int, int]] = []

    def noted(pipe: Any, tokens: int, depths: int, presses: list[Any]) -> list[Row]:
        calls.append((tokens, len(presses)))
        if tokens == 8000:
            raise quantpress.ContextTooLongError("8000 tokens are too many")
        report = Report(4000, 2000.0, 5.5, 2**20, 4 * 2**20, 1.0, 0.5, 0.25, 8)
        return [Row("uncompressed", (Trial(Needle("Oslo", 12345, 0.5), "12345", report),))]

    monkeypatch.setattr(loading, "load_pipeline", lambda *_: ours())
    monkeypatch.setattr(demo, "run_trials", noted)
    return calls


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_version_is_printed(asked: str) -> None:
    assert invoke(asked).stdout.strip() == quantpress.__version__


@pytest.mark.parametrize(
    ("line", "completed"), [("quantpress ins", "inspect"), ("quantpress run --dev", "--device")]
)
def test_a_shell_completes_commands_and_options(line: str, completed: str) -> None:
    shell = {"_QUANTPRESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": f"{line.count(' ')}"}
    assert CliRunner().invoke(cli.app, env=shell, prog_name="quantpress").stdout.split() == [completed]


def test_demo_gets_its_options(trials: list[tuple[int, int]]) -> None:
    shown = " ".join(invoke("demo").stdout.split())
    assert "Pride and Prejudice" in shown and "in float32 on cpu" in shown
    found = json.loads(invoke("demo", "--tokens", "512", "--json", "--fast").stdout)
    assert found["rows"][0]["trials"][0]["right"]
    assert trials == [(2048, 5), (512, 3)]  # the tiny model is in float32: the context is short


def test_an_error_of_ours_is_one_line_on_stderr(
    trials: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantpress", "demo", "--tokens", "8000"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "quantpress: 8000 tokens are too many\n")


@pytest.mark.parametrize("example", [example for _, example in cli.COMMANDS.values()])
def test_every_example_is_in_the_help_and_can_be_parsed(example: str) -> None:
    program, name, *arguments = shlex.split(example)
    command = get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    assert program == "quantpress" and command.help
    assert command.make_context(name, list(arguments)).info_name == name  # what it cannot parse raises
    shown = " ".join(invoke(name, "--help").stdout.split())
    assert f"Example: {example}" in shown


def test_every_command_is_in_the_table() -> None:
    assert list(get_command(cli.app).commands) == list(cli.COMMANDS)  # type: ignore[attr-defined]


def test_a_process_prints_one_json_document(tmp_path: Path) -> None:
    """Also of a press in the current folder, which Python itself does not look for there."""
    (tmp_path / "own.py").write_text("import kvpress\n\nclass Mine(kvpress.ScorerPress): ...\n")
    shape = "layers=2,kv_heads=2,head_dim=64"
    command = [sys.executable, "-m", "quantpress", "memory", shape, "-c", "1000", "--json"]
    command += ["-p", "own:Mine(0.5)"]
    how: dict[str, Any] = {"cwd": tmp_path, "env": {**os.environ, "PYTHONSAFEPATH": "1"}}
    good = subprocess.run(command, capture_output=True, text=True, timeout=HANG, **how)
    assert good.returncode == 0, good.stderr
    found = json.loads(good.stdout)
    sizes = [press["cache"]["total_bytes"] for press in found["presses"]]
    assert sizes == [2 * 2 * 2 * 64 * 1000 * 2, 2 * 2 * 2 * 64 * 500 * 2]


def test_doctor_names_every_part() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    parts = (
        "python",
        "torch",
        "transformers",
        "kvpress",
        "triton",
        "cuda",
        "attention",
        "encode",
        "dequantize",
    )
    for part in (*parts, "falls back", "default model", "its dtype"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("float16", "float16, from QUANTPRESS_DTYPE"),
        ("int8", "QUANTPRESS_DTYPE is 'int8'; set it to bfloat16, float32 or float16"),
        ("", "float"),
    ],
)
def test_doctor_says_the_dtype_of_the_default_model(
    monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    monkeypatch.setenv("QUANTPRESS_DTYPE", value)
    found = json.loads(invoke("doctor", "--json").stdout)["default_dtype"]
    assert found == said if value else said in found and "the quicker here" in found


def test_doctor_is_json_too() -> None:
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["versions"]["quantpress"] == quantpress.__version__
    assert found["backends"]["attend"] == ["reference", "triton"]
    assert found["fallbacks"]


def test_doctor_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-anywhere", "triton"))
    assert doctor.doctor().versions["no-such-package-anywhere"] is None
    assert "not installed" in invoke("doctor").stdout


def test_doctor_says_what_was_not_tested() -> None:
    ranges = {"torch": "tested on 2.11 to 2.13", "triton": "tested on 3.6 to 3.9"}
    assert doctor._untested({"torch": "2.13.0+cpu", "triton": "3.9.1"}) == {}
    assert doctor._untested({"torch": "2.11.0", "triton": None}) == {}
    assert doctor._untested({"torch": "2.10.1", "triton": "3.10.0"}) == ranges


@pytest.mark.parametrize(
    ("release", "plugins", "said"),
    [
        (None, [], []),
        ("0.33.1", ["quantpress.engines.vllm:register"], ["0.33.1", "loads the plugin quantpress.engines"]),
        ("0.34.0", [], ['tested with 0.33 (pip install "vllm==0.33.*")', "finds no plugin 'quantpress'"]),
    ],
)
def test_doctor_says_what_vllm_finds(
    monkeypatch: pytest.MonkeyPatch, release: str | None, plugins: list[str], said: list[str]
) -> None:
    def version(name: str) -> str:
        if release is None:
            raise PackageNotFoundError(name)
        return release

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(vllm_here, "version", version)
    monkeypatch.setattr(vllm_here, "requires", lambda _: ["torchvision==1", "torch==2.14.0", "x; extra=='y'"])
    found = [SimpleNamespace(value=value) for value in plugins]
    monkeypatch.setattr(vllm_here, "entry_points", lambda group, name: found)
    lines = json.loads(invoke("doctor", "--json").stdout)["vllm"]
    assert len(lines) == (3 if said else 0)
    for words, line in zip(said, lines, strict=False):
        assert words in line
    if said:
        assert lines[2] == f"asks for torch==2.14.0; {torch.__version__} is installed"
    if plugins:
        monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver")
        assert "does not load the plugin: VLLM_PLUGINS is 'lora_resolver'" in vllm_here.vllm_lines(None)[1]


def test_doctor_finds_the_reference_of_each_operation() -> None:
    backends = doctor.doctor().backends
    assert {"attend", "dequantize", "encode"} <= set(backends)
    assert all("reference" in found for found in backends.values())


@pytest.mark.parametrize(
    ("cuda", "fused", "expected"),
    [(False, True, ["CPU"]), (True, False, ["CPU", "CUDA"]), (True, True, ["CPU", "CUDA"])],
)
def test_attention_paths(cuda: bool, fused: bool, expected: list[str]) -> None:
    lines = doctor._attention(cuda, fused)
    assert [line.split(":")[0] for line in lines] == expected
    assert ("Triton" in lines[-1]) == (cuda and fused)


@pytest.mark.parametrize(
    ("triton", "cuda", "capability", "reason"),
    [
        ("3.7.1", None, None, "torch is a CPU build"),
        ("3.7.1", "12.8", None, "no NVIDIA GPU"),
        (None, "12.8", "9.0", "triton is not installed"),
        ("3.7.1", "12.8", "7.5", "everything on card: its compute capability is below 8.0"),
        ("3.7.1", "12.8", "9.0", "head_dim above 256"),
    ],
)
def test_what_falls_back_has_its_reason(
    triton: str | None, cuda: str | None, capability: str | None, reason: str
) -> None:
    devices = () if capability is None else (doctor.Device("card", capability, 2**34),)
    lines = doctor._fallbacks({"triton": triton}, cuda, devices)
    assert reason in lines[0]
    assert ("everything" in lines[0]) == (capability != "9.0" or triton is None)


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warns() -> None:
        warnings.warn("nothing was packed", stacklevel=1)
        warnings.warn("old", FutureWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", warns)
    before = warnings.showwarning
    cli.main()
    expected = "quantpress: warning: nothing was packed\nquantpress: warning: FutureWarning: old\n"
    assert capsys.readouterr() == ("", expected) and warnings.showwarning is before
