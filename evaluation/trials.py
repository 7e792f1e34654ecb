"""Facts planted in a book, one at a time, and asked for over caches compressed in different ways."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from kvpress import BasePress
from rich.console import Console
from rich.progress import track

from quantpress.evaluation.tasks.haystack import (
    ANSWER_PREFIX,
    Needle,
    book_text,
    is_right,
    needle_question,
    plant,
    random_needles,
)
from quantpress.pipelines.report import Report
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Compose

CHAT_TOKENS = 64  # room for what the chat form adds to the book
ANSWER_TOKENS = 8
SHOWN = 6  # characters of an answer in a table: one more than a number has

MakePress = Callable[[], BasePress | None]


@dataclass(frozen=True)
class Trial:
    """One fact, asked for over one cache."""

    needle: Needle
    answer: str
    report: Report

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
    """One press and its trials, one a depth."""

    press: str
    trials: tuple[Trial, ...]

    def mean(self, name: str) -> float:
        """Mean of one figure of the reports."""
        return float(sum(getattr(trial.report, name) for trial in self.trials) / len(self.trials))

    @property
    def seconds(self) -> float:
        """Reading and answering, all depths."""
        return sum(self.mean(name) for name in ("prefill_s", "compress_s", "decode_s")) * len(self.trials)


def run(pipe: TextGenerationPipeline, tokens: int, depths: int, presses: Sequence[MakePress]) -> list[Row]:
    """Ask for a fact at every depth over every press.

    Args:
        pipe: a `TextGenerationPipeline`.
        tokens: length of the context, chat form included, within a word or two.
        depths: number of facts, each in a context of its own.
        presses: make a press each; None is the uncompressed cache.
    """
    text, needles = book_text(), random_needles(depths)
    contexts = [plant(text, [needle], pipe.tokenizer, tokens - CHAT_TOKENS) for needle in needles]
    jobs = [(press, place) for press in presses for place in range(depths)]
    trials: dict[MakePress, list[Trial]] = {press: [] for press in presses}
    for press, place in track(jobs, "asking", console=Console(stderr=True), transient=True):
        with torch.random.fork_rng():
            torch.manual_seed(place)  # some presses draw random projections
            result = pipe(
                contexts[place],
                question=needle_question(needles[place].city),
                answer_prefix=ANSWER_PREFIX,
                press=press(),
                max_new_tokens=ANSWER_TOKENS,
                report=True,
            )
        trials[press].append(Trial(needles[place], result["answer"], result["report"]))
    return [Row(name_of(press()), tuple(trials[press])) for press in presses]


def name_of(press: BasePress | None) -> str:
    """The presses and the first setting of each: what they evict, or how many bits they keep."""
    if press is None:
        return "uncompressed"
    parts = press.presses if isinstance(press, Compose) else (press,)
    return " | ".join(f"{type(part).__name__}({getattr(part, fields(part)[0].name)})" for part in parts)
