"""The demo: what its table says is what was measured."""

import json

import pytest
import torch
from rich.console import Console

from quantpress.cli import demo as command
from quantpress.evaluation import demo
from quantpress.evaluation.demo import Row, Trial, run_trials
from quantpress.evaluation.tasks.haystack import Needle
from quantpress.pipelines.report import Report
from quantpress.presses import TurboQuant
from tests.pipelines.words import ours


def _report(resident=2**20):
    return Report(4000, 2000.0, 5.5, resident, 4 * 2**20, 1.0, 0.5, 0.25, 8)


def _rows():
    near, far = Needle("Oslo", 12345, 0.25), Needle("Cairo", 67890, 0.75)
    right = Row(
        "uncompressed", (Trial(near, " 12345.\n", _report()), Trial(far, " 67,890", _report(3 * 2**20)))
    )
    wrong = Row(
        "SnapKV(0.5)", (Trial(near, " 12344.", _report()), Trial(far, "It is not mentioned.", _report()))
    )
    return [right, wrong]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)], ids=str)
def test_the_table_shows_right_and_wrong_answers_and_measured_means(dtype, bits):
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(demo.table(_rows(), dtype))
    shown = capture.get()
    first, second = (line for line in shown.splitlines() if "✓" in line or "✗" in line)
    assert first.split()[0] == "uncompressed" and first.count("✓") == 2
    assert "✓12345" in first
    assert "✗12344" in second
    assert second.count("✗") == 2
    for words in ("✓67890", "5.50", "2.0 MiB", "2.67x", "3.5"):  # (4 / 1 + 4 / 3) / 2 = 2.67
        assert words in first
    assert "4,000 tokens" in shown
    name = str(dtype).removeprefix("torch.")
    assert f"which stay in {name} ({bits} bits)" in " ".join(shown.split())
    assert f"to all tokens read, uncompressed in {name} ({bits} bits a value)" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (" 12,345.\n", "12345"),
        (" 123456.", "123456"),
        ("it is 1234567", "123456…"),
        (" unmentioned", "unment…"),
        ("", ""),
    ],
)
def test_what_was_said_is_short(answer, said):
    assert Trial(Needle("Oslo", 12345, 0.5), answer, _report()).said == said


def test_figures_are_json():
    shown = command.Demonstrated("tiny", torch.bfloat16, "cpu", 2, 1.5, _rows())
    found = json.loads(json.dumps(shown.as_dict()))
    assert [[trial["right"] for trial in row["trials"]] for row in found["rows"]] == [
        [True, True],
        [False, False],
    ]
    assert found["rows"][0]["trials"][1]["report"]["resident_bytes"] == 3 * 2**20
    assert (found["seconds"], found["threads"], found["dtype"]) == (1.5, 2, "bfloat16")


def test_every_depth_is_asked_for_over_every_press():
    presses = (lambda: None, TurboQuant)
    rows = run_trials(ours(), 600, 3, presses)
    assert [row.press for row in rows] == ["uncompressed", "TurboQuant(4)"]
    for row in rows:
        assert [trial.needle.depth for trial in row.trials] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
        assert 500 < row.mean("tokens_seen") <= 600
        assert row.seconds == pytest.approx(
            sum(one.report.prefill_s + one.report.compress_s + one.report.decode_s for one in row.trials)
        )
    assert rows[1].mean("ratio") > rows[0].mean("ratio")


@pytest.fixture
def one_depth(monkeypatch):
    """A shorter text, half-way: `test_haystack.py` has the model find what lies elsewhere."""
    monkeypatch.setattr(command, "DEPTHS", 1)
    monkeypatch.setattr(command, "FAST_TOKENS", 512)


@pytest.mark.slow
@pytest.mark.usefixtures("one_depth")
def test_the_main_job():
    """On the default model nothing is lost uncompressed or by TurboQuant; the figures are those of 4 bits.

    In whichever dtype this machine takes: the bits are those of the formula in docs/how_it_works.md.
    """
    found = command.demo(fast=True).as_dict()
    rows = {row["cache"]: row["trials"] for row in found["rows"]}
    assert len(rows) == len(command.FAST_PRESSES)
    for name in ("uncompressed", "TurboQuant(4)"):
        assert all(trial["right"] for trial in rows[name]), rows[name]
    plain, packed = (rows[name][0]["report"] for name in ("uncompressed", "TurboQuant(4)"))
    assert packed["tokens_seen"] == packed["tokens_kept"] == pytest.approx(command.FAST_TOKENS, abs=64)
    width, tokens = {"float32": 32, "bfloat16": 16, "float16": 16}[found["dtype"]], packed["tokens_seen"]
    pages = (tokens - 4 - 128) // 128
    by_hand = (128 * pages * (4 + 16 / 64) + width * (tokens - 128 * pages) + 32) / tokens
    assert packed["bits_per_value"] == pytest.approx(by_hand)
    assert packed["ratio"] == pytest.approx(width / by_hand)
    assert (plain["bits_per_value"], plain["ratio"]) == (width, 1)
