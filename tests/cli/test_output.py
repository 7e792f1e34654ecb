"""What commands show, whole at 80 and at 120 columns: tables of made-up results, and bars in a terminal."""

import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from rich.console import Console

from quantpress.cli.bench import Benchmark, Side
from quantpress.cli.compare import Answer, Compared, Comparison
from quantpress.cli.demo import Demonstrated
from quantpress.cli.doctor import Device, Diagnosis
from quantpress.cli.inspect import Candidate, Inspected, Layer
from quantpress.cli.output import Outcome, _show, new_table
from quantpress.cli.pack import Packed
from quantpress.cli.run import Answered
from quantpress.cli.validate import Check, Validated
from quantpress.codecs.reports import CodecReport
from quantpress.evaluation import demo
from quantpress.evaluation.demo import Row, Trial
from quantpress.evaluation.key_statistics import KeyStatistics
from quantpress.evaluation.tasks.haystack import Needle
from quantpress.pipelines.reading import read_context
from quantpress.pipelines.report import Report, ratio_note
from tests.pipelines.words import ours

PRESS = (
    "SnapKV(0.35, window_size=128, kernel_size=7) | TurboQuant(key_bits=8, value_bits=4, recent_tokens=256)"
)
REPORT = Report(131072, 123456.0, 31.75, 987 * 2**20, 4 * 2**30, 1234.5, 234.25, 345.75, 1024)
MACHINE = {"device": "8 x NVIDIA H200", "dtype": "float32", "threads": 128, "torch": "2.11.0+cu128"}
MODEL = "an-organization/A-Model-with-a-Long-Name-1234B-Instruct"
CODEC = CodecReport(256, 4096, 3.125, 0.00123, 1e-4, 0.00123, 0.00123, 0.00123, 0.00123, -0.1234, -0.1234)
ANSWER = Answer("Fitzwilliam Darcy, of Pemberley", 32, 7, 7 / 32)
TRIALS = tuple(Trial(Needle("Santiago", 98765, depth), "98765", REPORT) for depth in (1 / 6, 1 / 2, 5 / 6))
LAYERS = (
    Layer(
        126, "sliding", 128, 192, 128, False, "a sliding window", KeyStatistics(0.25, 0.75, 12.5, 10.5, 192)
    ),
    Layer(127, "full", 128, 256, 256, True, "", None),
)
OUTCOMES: list[Outcome] = [
    Demonstrated(
        MODEL, torch.float32, "cuda", 128, 1234.5, [Row(PRESS, TRIALS), Row("uncompressed", TRIALS)]
    ),
    Answered(MODEL, PRESS, ("Who is it?",), ("Mr Darcy.",), REPORT, "float32"),
    Packed("a/long/name/of/a/book.kv.safetensors", MODEL, PRESS, 131072, 2**30, 2**30, 2**32, 3.25),
    Comparison(
        MODEL,
        MACHINE,
        ("Who is it?",),
        (Compared("uncompressed", (ANSWER,), REPORT), Compared(PRESS, refusal="it needs more tokens")),
    ),
    Benchmark(
        MODEL, MACHINE, 1024, 3, tuple(Side(one, 1234.56, 1234.5, 2**36, REPORT) for one in ("a", PRESS))
    ),
    Inspected(
        MODEL,
        "AModelWithALongNameForCausalLM",
        131072,
        LAYERS,
        64,
        "No setting could be tried.",
        (Candidate(PRESS, 4.125, 0.999, 0.875, 0.125),),
        PRESS,
    ),
    Validated((Check("value", 2.5, CODEC), Check("key", 8, CODEC))),
    Diagnosis(
        "Linux-6.8.0-1021-x86_64-with-glibc2.39, cpython",
        {"torch": "2.16.0+cu130", "transformers": "5.2.0", "triton": None},
        "12.8",
        (Device("NVIDIA H200", "9.0", 2**37),),
        {"dequantize": ("reference", "triton")},
        ("CUDA: fused Triton kernels",),
        ("everything: triton is not installed (pip install triton)",),
        "/a/long/folder/of/some/user/.cache/quantpress/SmolLM2-135M-Instruct: fetched when it is first used",
        "float32, the quicker here; QUANTPRESS_DTYPE sets another",
        untested={"torch": "tested on 2.11 to 2.13"},
    ),
]


def rendered(outcome: Outcome, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(outcome.__rich__())
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda one: type(one).__name__)
def test_tables_are_whole(outcome: Outcome, width: int) -> None:
    """Every character is there, cells may be folded, and no figure is broken in two."""
    wide, shown = rendered(outcome, 2000), rendered(outcome, width)
    assert max(map(len, shown.splitlines())) <= width
    everything, seen = (sorted(re.sub(r"[\s\u2500-\u257f]", "", one)) for one in (wide, shown))
    assert seen == everything, shown
    figures = set(re.findall(r"(?<!\S)[+-]?\d[\d.,]*[x%]?(?!\S)", wide))
    assert figures <= set(shown.split()), shown


def test_the_dtype_of_ratios_is_named() -> None:
    for outcome in (OUTCOMES[1], OUTCOMES[3], OUTCOMES[4]):
        assert ratio_note("float32") in " ".join(rendered(outcome, 2000).split())
    assert "against 16 bits it is half" in rendered(OUTCOMES[0], 2000)
    assert "half" not in ratio_note("bfloat16")


def in_terminal(columns: int, work: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What some work writes to the standard error if that is a terminal, without its colors."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    written: list[bytes] = []

    def drain() -> None:
        with suppress(OSError):  # once nobody can write any more
            while piece := os.read(master, 4096):
                written.append(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(slave, "w") as terminal, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        patched.setenv("TERM", "xterm")
        patched.delenv("COLUMNS", raising=False)
        work()
    reader.join()
    os.close(master)
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", b"".join(written).decode())


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_one_bar_at_a_time(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's own bar must not be drawn over that of the command."""
    monkeypatch.setattr(read_context, "PATIENCE_S", 0)  # also bars that wait for slow machines
    shown = in_terminal(columns, lambda: demo.run_trials(ours(), 200, 2, [lambda: None]), monkeypatch)
    lines = [line.strip() for line in re.split(r"[\r\n]+", shown) if line.strip()]
    assert lines and all(line.startswith("asking ") and len(line) <= columns for line in lines)


def test_brackets_in_a_cell_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("What is missing", ["package", "remedy"], ["package", "remedy"])
    table.add_row("kvpress", 'pip install "quantpress[kvpress]"')
    _show(table)
    assert '"quantpress[kvpress]"' in capsys.readouterr().out
