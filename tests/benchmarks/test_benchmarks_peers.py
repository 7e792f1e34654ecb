"""The benchmark of the alternatives, as far as it goes without a GPU and without the alternatives."""

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmarks.loading import benchmark
from tests.limits import HANG


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    """benchmarks/peers.py as a module; the search path is put back."""
    path = list(sys.path)
    yield benchmark("peers")
    sys.path[:] = path


def alternative(peers: ModuleType, name: str) -> Any:
    return next(one for one in peers.ALTERNATIVES if one.name == name)


def test_the_reference_is_attention(peers: ModuleType) -> None:
    query, keys, values = (torch.randn(1, heads, n, 64) for heads, n in ((6, 1), (2, 50), (2, 50)))
    wide = [states.repeat_interleave(3, dim=1) for states in (keys, values)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *wide)
    torch.testing.assert_close(peers.reference(query, keys, values), expected[0, :, 0])


@pytest.mark.parametrize(("bits", "error"), [("4/4", 0.14), ("2/2", 0.5)])
def test_our_rows_are_measured(peers: ModuleType, bits: str, error: float) -> None:
    """256 of 512 tokens are packed: codes and a 16-bit scale for each vector, the others 16 bits a number."""
    row = peers.measure(alternative(peers, "quantpress"), bits, 512, "cpu", False)
    packed = 2 * (128 * int(bits[0]) // 8 + 2)
    assert row.bytes == pytest.approx((512 + packed) / 2, rel=0.01)
    assert error / 4 < row.error < error and row.own_error < 5e-3 and row.us is None


def test_half_of_the_tokens_are_half_of_the_bytes(peers: ModuleType) -> None:
    row = peers.measure(alternative(peers, "kvpress's SnapKV(0.5)"), "16/16", 256, "cpu", False)
    assert row.bytes == 256 and row.own_error < 5e-3 < row.error


def test_a_cache_that_appends_is_compared_with_what_it_holds(peers: ModuleType) -> None:
    from alternatives.caches import appended

    held: dict[str, torch.Tensor] = {}

    def make(scale: float, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Any:
        def update(*new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2) * scale

        held.update(keys=keys, again=[keys.transpose(1, 2)])
        return appended(update, held, (keys, values, query))

    one = peers.Alternative("dense", {"right": 1.0, "wrong": 1.5}, make)
    right, wrong = (peers.measure(one, setting, 256, "cpu", False) for setting in one.settings)
    assert right.error < 5e-3 and wrong.error == pytest.approx(0.5, rel=0.02)
    assert right.bytes == 256  # one of the two tensors, counted once


def test_what_raises_is_a_row_and_the_next_setting_is_measured(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dense = alternative(peers, "torch bfloat16")

    def make(setting: float, *states: torch.Tensor) -> Any:
        if setting == 0:
            raise ZeroDivisionError("no such width\nand more")
        return dense.make(setting, *states)

    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    arguments = argparse.Namespace(json=tmp_path / "rows", tokens=[256], check=True)
    peers.child(peers.Alternative("ours", {"0": 0, "1": 1}, make), arguments)
    rows = [json.loads(line) for line in arguments.json.read_text().splitlines()]
    assert [row["note"] for row in rows] == ["ZeroDivisionError: no such width", ""]
    assert rows[0]["error"] is None and rows[1]["error"] < 5e-3


def test_processes_that_end_badly_are_rows_too(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stand-ins for peers.py: one measures, one crashes behind its first row, one never ends."""
    from alternatives import processes

    script = tmp_path / "peers.py"
    script.write_text(
        "import json, os, sys, time\n"
        "word = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert sys.stdin.readline() == '\\n'\n"
        "row = {'name': word['--child'], 'version': '1', 'bits': '4/4', 'tokens': int(word['--tokens'])}\n"
        "open(word['--json'], 'w').write(json.dumps(row) + '\\n')\n"
        "print('illegal memory access', flush=True)\n"
        "{'dies': lambda: os._exit(3), 'hangs': lambda: time.sleep(60)}.get(word['--child'], int)()\n"
    )
    monkeypatch.setattr(processes, "SCRIPT", str(script))
    rows = processes.Process.rows

    def patient(process: Any, timeout: float) -> Any:
        """The limit counts from the first row on, and for the one that hangs: how quickly a process starts is
        the machine's business.
        """
        while not (process.output.exists() and process.output.read_text().endswith("\n")):
            time.sleep(0.01)
        return rows(process, timeout if process.alternative.name == "hangs" else HANG)

    monkeypatch.setattr(processes.Process, "rows", patient)
    arguments = argparse.Namespace(sites=None, tokens=[256], timeout=1.0, check=False)
    chosen = [
        peers.Alternative(name, {}, print, builds=name == "works") for name in ("works", "dies", "hangs")
    ]
    monkeypatch.setattr(processes, "compile_all", lambda *arguments: {})
    found = [(row.name, row.bits, row.note) for row in processes.run(chosen, arguments)]
    assert found == [
        ("dies", "4/4", ""),
        ("dies", "", "process ended: illegal memory access"),
        ("hangs", "4/4", ""),
        ("hangs", "", "took more than 1 s"),
        ("works", "4/4", ""),
    ]


def test_a_missing_package_is_a_line_and_the_table_goes_on(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = peers.Alternative("absent", {"4/4": 4}, print, "no-such-package", "1.2")
    present = [
        peers.Row("torch bfloat16", "", "16/16", 256, us=90.0),
        peers.Row("ours", "", "4/4", 256, us=30),
    ]
    monkeypatch.setattr(peers, "ALTERNATIVES", (*peers.ALTERNATIVES, absent))
    asked = []
    monkeypatch.setattr(peers, "run", lambda chosen, arguments: asked.extend(chosen) or iter(present))
    only = ["absent", "torch bfloat16"]
    words = ["--check", "--json", str(tmp_path / "rows"), "--only", *only]
    peers.main(words)
    printed = capsys.readouterr().out
    assert "absent: not installed: pip install no-such-package==1.2" in printed
    assert [one.name for one in asked] == ["torch bfloat16"]
    assert re.search(r"ours.*4/4.*256.*30\.0.*3\.00x", printed)
    assert [row["ratio"] for row in json.loads((tmp_path / "rows").read_text())] == [1.0, 3.0]


@pytest.mark.parametrize("words", [["--tokens", "200"], ["--only", "nobody"]])
def test_arguments_that_cannot_be_are_refused(
    peers: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--check", *words])
    assert words[1] in capsys.readouterr().err
