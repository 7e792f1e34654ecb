"""Facts planted in a book, one at a time, and asked for over caches compressed in different ways.

A slice of Pride and Prejudice is read once for every depth and every press, with one fact at that depth.
Presses that evict without knowing the question may drop it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from quantpress.evaluation.sizing.kept_tokens import described
from quantpress.evaluation.tasks.cases import CHAT_TOKENS
from quantpress.evaluation.tasks.haystack import (
    ANSWER_PREFIX,
    Needle,
    book_text,
    is_right,
    needle_question,
    plant,
    random_needles,
)
from quantpress.pipelines.report import Report, format_bytes, ratio_note
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses.base_press import BasePress

ANSWER_TOKENS = 8
SHOWN = 6  # characters of an answer in a table: one more than a number has

MakePress = Callable[[], BasePress | None]


@dataclass(frozen=True)
class Trial:
    """One fact, asked for over one cache."""

    needle: Needle
    answer: str
    report: Report

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        asked = {"depth": self.needle.depth, "city": self.needle.city, "number": self.needle.number}
        return {**asked, "answer": self.answer, "right": self.right, "report": self.report.as_dict()}

    @property
    def right(self) -> bool:
        """Whether the answer is the planted number."""
        return is_right(self.answer, self.needle)

    @property
    def said(self) -> str:
        """The number in the answer, or its first word; short enough for a table."""
        answer = self.answer.replace(",", "")
        found = re.search(r"\d+", answer) or re.search(r"\S+", answer)
        shown = found[0] if found else ""
        return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"


@dataclass(frozen=True)
class Row:
    """One press and its trials, one for each depth."""

    press: str
    trials: tuple[Trial, ...]

    def mean(self, name: str) -> float:
        """Mean of one field of the reports."""
        return float(sum(getattr(trial.report, name) for trial in self.trials) / len(self.trials))

    @property
    def seconds(self) -> float:
        """Seconds of reading and answering, all depths together."""
        return sum(self.mean(name) for name in ("prefill_s", "compress_s", "decode_s")) * len(self.trials)


def run_trials(
    pipe: TextGenerationPipeline, tokens: int, depths: int, presses: Sequence[MakePress]
) -> list[Row]:
    """Ask for a fact at every depth over every press.

    Args:
        pipe: loaded model and tokenizer.
        tokens: length of the context, chat form included, within a word or two.
        depths: number of facts, each in a context of its own.
        presses: functions that make a press each, or None for the uncompressed cache.

    Returns:
        One row for each press.

    Raises:
        InvalidInputError: no fact fits into `tokens`, or the book has fewer.
    """
    text, needles = book_text(), random_needles(depths)
    contexts = [plant(text, [needle], pipe.tokenizer, tokens - CHAT_TOKENS) for needle in needles]
    jobs = [(press, index) for press in presses for index in range(depths)]
    trials: dict[MakePress, list[Trial]] = {press: [] for press in presses}
    for press, index in track(jobs, "asking", console=Console(stderr=True), transient=True):
        with torch.random.fork_rng():
            torch.manual_seed(index)  # some presses draw random projections
            result = pipe(
                contexts[index],
                question=needle_question(needles[index].city),
                answer_prefix=ANSWER_PREFIX,
                press=press(),
                max_new_tokens=ANSWER_TOKENS,
                report=True,
                progress=False,  # one bar at a time
            )
        trials[press].append(Trial(needles[index], result["answer"], result["report"]))
    return [Row(described(press()), tuple(trials[press])) for press in presses]


def table(rows: Sequence[Row], dtype: torch.dtype) -> Table:
    """The rows for people: answers by depth, then what the cache takes.

    Args:
        rows: rows of `run_trials`.
        dtype: dtype of the model, and so of an uncompressed cache.
    """
    first, name = rows[0], str(dtype).removeprefix("torch.")
    shown = Table(
        title=f"A number hidden in {first.mean('tokens_seen'):,.0f} tokens of Pride and Prejudice",
        caption="All that a cache keeps counts: codes, scales, and the first and last tokens, which stay in "
        f"{name} ({8 * dtype.itemsize} bits). {ratio_note(name)}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    shown.add_column("cache", overflow="fold")
    for trial in first.trials:
        shown.add_column(f"at {trial.needle.depth:.0%}\n{trial.needle.number}", no_wrap=True)
    for head in ("bits a\nvalue", "\nresident", "\nratio", "time\ns"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.press.replace(" | ", "\n| "),
            *(_verdict(trial) for trial in row.trials),
            f"{row.mean('bits_per_value'):.2f}",
            format_bytes(round(row.mean("resident_bytes"))),
            f"{row.mean('ratio'):.2f}x",
            f"{row.seconds:.1f}",
        )
    return shown


def _verdict(trial: Trial) -> Text:
    return Text(f"{'✓' if trial.right else '✗'}{trial.said}", "green" if trial.right else "red")
