"""The command line: what each command prints, forwards and returns."""

import sys
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import quantpress
from quantpress import cli, doctor


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A demo that only notes how it was called; it fails when asked for 13 tokens."""
    calls: list[dict[str, Any]] = []

    def main(**options: Any) -> int:
        calls.append(options)
        if options["tokens"] == 13:
            raise quantpress.ContextTooLongError("13 tokens are too many")
        return 0

    module = ModuleType("quantpress.pipelines.demo")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quantpress.pipelines.demo", module)
    return calls


def test_version_is_printed() -> None:
    assert invoke("version").stdout.strip() == quantpress.__version__


def test_demo_gets_its_options(demo: list[dict[str, Any]]) -> None:
    assert invoke("demo").exit_code == 0
    assert invoke("demo", "--tokens", "512", "--json", "--fast").exit_code == 0
    assert demo == [
        {"tokens": None, "json": False, "fast": False},
        {"tokens": 512, "json": True, "fast": True},
    ]


def test_an_error_of_ours_is_one_line(demo: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quantpress", "demo", "--tokens", "13"])
    with pytest.raises(SystemExit, match=r"^quantpress: 13 tokens are too many$"):
        cli.main()


def test_unknown_command_is_refused() -> None:
    assert invoke("no-such-command").exit_code == 2


def test_doctor_names_every_part() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    for part in (
        "python",
        "torch",
        "transformers",
        "kvpress",
        "triton",
        "cuda",
        "attention",
        "encode",
        "decode",
    ):
        assert part in result.stdout


def test_doctor_reports_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package-anywhere", "triton"))
    assert doctor.diagnose().versions["no-such-package-anywhere"] is None
    assert "not installed" in invoke("doctor").stdout


def test_doctor_finds_the_reference_of_each_operation() -> None:
    backends = doctor.diagnose().backends
    assert {"attend", "decode", "encode"} <= set(backends)
    assert all("reference" in found for found in backends.values())


@pytest.mark.parametrize(
    ("cuda", "fused", "expected"),
    [(False, True, ["CPU"]), (True, False, ["CPU", "CUDA"]), (True, True, ["CPU", "CUDA"])],
)
def test_attention_paths(cuda: bool, fused: bool, expected: list[str]) -> None:
    lines = doctor._attention(cuda, fused)
    assert [line.split(":")[0] for line in lines] == expected
    assert ("Triton" in lines[-1]) == (cuda and fused)
