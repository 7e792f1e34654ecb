"""Wrong arguments are refused before a model is loaded, and most of them before torch is imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from quantpress import cli
from quantpress.cli import inspect, loading
from quantpress.cli.arguments import check_loading, check_output_file, check_output_folder, check_packed
from quantpress.errors import InvalidInputError, QuantPressError
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses import TurboQuant
from tests.limits import HANG

LIGHT = [
    ("no-such-command", "no-such-command"),
    ("run --nothing", "--nothing"),
    ("memory --context 0", "--context"),
    ("demo --tokens 5", "--tokens"),
    ("run", "--cache FILE"),
    ("run TEXT --cache TEXT", "not both"),
    ("run nowhere.txt", "nowhere.txt cannot be read"),
    ("run BLANK", "has no text"),
    ("run --cache nowhere", "nowhere is not a file"),
    ("run TEXT -m /no/such/model", "/no/such/model cannot be loaded"),
    ("run TEXT -m FOLDER", "no config.json"),
    ("run TEXT --dtype int99", "int99"),
    ("run TEXT --max-new-tokens 0", "--max-new-tokens"),
    ("pack nowhere.txt", "nowhere.txt cannot be read"),
    ("pack -", "--output FILE"),
    ("pack TEXT -o no/folder/x", "no folder no/folder"),
    ("pack TEXT -o FOLDER", "is a folder"),
    ("pack TEXT -o TEXT", "is the text itself"),
    ("serve /no/such/model", "/no/such/model cannot be loaded"),
    ("serve --port 99999", "--port"),
    ("serve --store-bytes 20GB", "give its place, --store PATH, too"),
    ("compare nowhere.txt", "nowhere.txt cannot be read"),
    ("compare -m TEXT", "it is a file"),
    ("compare --tokens 20", "--tokens"),
    ("eval --suite huge", "huge"),
    ("eval --part speed", "speed"),
    ("eval --output TEXT/results", "is a file"),
    ("eval --output FOLDER -m ./nowhere", "nowhere cannot be loaded"),
    ("bench --new-tokens 3", "--new-tokens"),
    ("bench -m ../nowhere", "nowhere cannot be loaded"),
    ("fit --text nowhere.txt", "nowhere.txt cannot be read"),
    ("fit -o no/folder/x", "no folder no/folder"),
    ("fit --text TEXT -o TEXT", "is a text to read"),
    ("fit --widths 2,5", "--widths is '2,5'; give some of 1,2,3,4,8"),
    ("fit /no/such/model", "/no/such/model cannot be loaded"),
    ("calibrate --text nowhere.txt", "nowhere.txt cannot be read"),
    ("calibrate -o no/folder/x", "no folder no/folder"),
    ("calibrate --text TEXT -o TEXT", "is a text to read"),
    ("calibrate --tokens 100", "--tokens"),
    ("calibrate /no/such/model", "/no/such/model cannot be loaded"),
    ("inspect --tokens 256", "--tokens"),
    ("inspect --file nowhere.txt", "nowhere.txt cannot be read"),
    ("inspect /no/such/model", "/no/such/model cannot be loaded"),
    ("validate --samples 0", "--samples"),
]
HEAVY = [
    ("run TEXT -p SnapVK", "SnapKV"),
    ("run TEXT --device cuda:99", "no device cuda:99"),
    ("run --cache TEXT", "damaged"),
    ("pack TEXT -p SnapVK", "SnapKV"),
    ("pack TEXT -p DecodingPress(Knorm(0.5))", "acts during decoding"),
    ("serve --port 0 -p SnapVK", "SnapKV"),
    ("serve --port 0 -p none", "compresses nothing"),
    ("serve --port 0 --store TEXT", "cannot be used as a store"),
    ("serve --port 0 --store s4://bucket", "Protocol not known: s4"),
    ("serve --port 0 --store FOLDER -p DecodingPress(Knorm(0.5))", "leave out --store"),
    ("compare TEXT -p SnapVK", "SnapKV"),
    ("compare TEXT --device gpu", "no device 'gpu'"),
    ("eval --output FOLDER -p SnapVK", "SnapKV"),
    ("eval --output FOLDER --device mps", "no device mps"),
    ("bench -p TurboQuant(bits=99)", "99"),
    ("calibrate -o FOLDER/profile --device xpu", "no device xpu"),
    ("fit --press SnapVK", "SnapKV"),
    ("fit --from nowhere.json", "nowhere.json cannot be read as a plan"),
    ("inspect --device xpu", "no device xpu"),
    ("inspect TEXT", "damaged"),
    ("inspect nowhere.safetensors", "give one that `quantpress calibrate` wrote"),
    ("validate --bits 5", "5"),
    ("validate --rotation none", "none"),
]

RUN_ALL = """
import json, sys
from typer.testing import CliRunner
from quantpress.cli import COMMANDS, app
from quantpress.errors import QuantPressError
runner, said = CliRunner(env={"COLUMNS": "200"}), []
commands = json.load(sys.stdin)
for name in COMMANDS:
    assert runner.invoke(app, [name, "--help"]).exit_code == 0, name
for words in commands:
    done = runner.invoke(app, words)
    assert done.exit_code == 2 or isinstance(done.exception, QuantPressError), (words, done)
    said.append(f"{done.exception} {done.output}")
heavy = {"torch", "transformers", "kvpress", "numpy", "scipy"} & set(sys.modules)
print(json.dumps([said, sorted(heavy)]))
"""


def words(command: str, folder: Path) -> list[str]:
    """The words of a command; TEXT, BLANK and FOLDER are in `folder`."""
    (folder / "TEXT").write_text("once upon a time", encoding="utf-8")
    (folder / "BLANK").write_text(" \n", encoding="utf-8")
    (folder / "FOLDER").mkdir(exist_ok=True)
    return re.sub(r"TEXT|BLANK|FOLDER", lambda found: str(folder / found[0]), command).split()


def test_neither_help_nor_most_wrong_arguments_wait_for_torch(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([words(command, tmp_path) for command, _ in LIGHT]),
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    said, heavy = json.loads(done.stdout)
    assert not heavy
    for (command, reason), one in zip(LIGHT, said, strict=True):
        assert reason in one, command


@pytest.mark.parametrize(("command", "reason"), HEAVY)
def test_the_other_wrong_arguments_do_not_wait_for_a_model(
    command: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(QuantPressError, match=re.escape(reason)):
        CliRunner().invoke(cli.app, words(command, tmp_path), catch_exceptions=False)


def test_a_device_that_is_not_here_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(sys, "argv", ["quantpress", *words("run TEXT --device cuda", tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == ""
    assert shown.err.startswith("quantpress: there is no device cuda") and shown.err.count("\n") == 1


def test_devices_that_are_here_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: cuda)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in (None, "auto", "cpu", "cpu:0", "cuda", "cuda:1"):
        check_loading("some/model", device, None)
    with pytest.raises(InvalidInputError, match="finds cuda:0 to cuda:1 here"):
        check_loading("some/model", "cuda:2", None)


def test_a_wrong_dtype_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTPRESS_DTYPE", "int8")
    check_loading("some/model", None, None)
    check_loading(None, None, "float32")
    with pytest.raises(InvalidInputError, match="QUANTPRESS_DTYPE is 'int8'"):
        check_loading(None, None, None)


def test_files_that_may_not_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_output_file("here")
    check_output_folder(tmp_path / "new" / "folder")
    (tmp_path / "packed").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may do everything
    with pytest.raises(InvalidInputError, match="permissions"):
        check_packed(str(tmp_path / "packed"))
    with pytest.raises(InvalidInputError, match="may not write"):
        check_output_file(str(tmp_path / "new"))
    with pytest.raises(InvalidInputError, match="may not write"):
        check_output_folder(tmp_path)


def test_inspect_wants_as_many_tokens_as_a_setting_needs() -> None:
    press = TurboQuant()
    assert press.sink_tokens + press.recent_tokens + PAGE_TOKENS == inspect.LEAST_TOKENS
