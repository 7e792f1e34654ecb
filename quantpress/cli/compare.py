"""`quantpress compare`: several presses on the same text and questions, beside the uncompressed cache."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quantpress.cli.arguments import (
    Device,
    Dtype,
    Model,
    Presses,
    QuestionAware,
    Questions,
    check_loading,
    read_text,
)
from quantpress.cli.output import Outcome, new_table, one_below_the_other, progress
from quantpress.errors import QuantPressError

if TYPE_CHECKING:
    from quantpress.pipelines.report import Report
    from quantpress.pipelines.text_generation import TextGenerationPipeline
    from quantpress.presses.base_press import BasePress

DEFAULT_PRESSES = (
    "TurboQuant(bits=4)",
    "TurboQuant(bits=3)",
    "SnapKV(0.5)",
    "SnapKV(0.5) | TurboQuant(bits=4)",
)
LEAST_TOKENS = 64  # the hidden number and a sentence or two
FIGURES = ("agree-\nment", "kept", "bits a\nvalue", "cache\nbytes", "ratio", "read\ns", "answer\ns")


@dataclass(frozen=True)
class Answer:
    """One answer over one cache.

    Args:
        text: text of the answer.
        tokens: number of its tokens.
        same_tokens: number of tokens, from the first on, that agree with the uncompressed cache.
        agreement: `same_tokens` as a share of the longer of the two answers; 1.0 for the same answer.
    """

    text: str
    tokens: int
    same_tokens: int
    agreement: float


@dataclass(frozen=True)
class Compared:
    """One press.

    Args:
        press: as it is written.
        answers: one for each question; empty where the press was refused.
        report: what it cost; None where the press was refused.
        refusal: why the press cannot be used here; None when it can.
    """

    press: str
    answers: tuple[Answer, ...] = ()
    report: "Report | None" = None
    refusal: str | None = None

    @property
    def agreement(self) -> float:
        """Mean agreement over the questions."""
        return sum(answer.agreement for answer in self.answers) / max(1, len(self.answers))


@dataclass(frozen=True)
class Comparison(Outcome):
    """The uncompressed cache, then the presses.

    Args:
        model: name of the model.
        machine: device, dtype, threads and versions.
        questions: questions that each press was asked.
        rows: one for each press.
        question_aware: whether the presses saw each question.
    """

    model: str
    machine: dict[str, Any]
    questions: tuple[str, ...]
    rows: tuple[Compared, ...]
    question_aware: bool = False

    @property
    def exit_status(self) -> int:
        """2 when a press was refused."""
        return 2 if any(row.refusal for row in self.rows) else 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        rows = []
        for row in self.rows:
            answers = [
                {"question": question, **asdict(answer)}
                for question, answer in zip(self.questions, row.answers, strict=False)
            ]
            report = None if row.report is None else row.report.as_dict()
            rows.append({"press": row.press, "refusal": row.refusal, "answers": answers, "report": report})
        about = {"model": self.model, "machine": self.machine, "question_aware": self.question_aware}
        return {**about, "presses": rows}

    def __rich__(self) -> RenderableType:
        from quantpress.pipelines.report import ratio_note

        where = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        seen = next((row.report.tokens_seen for row in self.rows if row.report), 0)
        table = new_table(
            f"{self.model}: {seen:,} tokens, {len(self.questions)} asked{', in view' * self.question_aware}",
            ("cache", *FIGURES),
            words=("cache",),
            caption=f"{where}.\nAgreement: the tokens of the answers before the first one that the "
            f"uncompressed cache would not have given. {ratio_note(self.machine['dtype'])}",
        )
        for row in self.rows:
            table.add_row(one_below_the_other(row.press), *_figures(row))
        return Group(table, *(self._asked(index) for index in range(len(self.questions))))

    def _asked(self, index: int) -> Table:
        """The answers to one question, one below the other."""
        table = Table(
            title=self.questions[index].strip() or "What follows", title_style="bold", show_header=False
        )
        table.add_column("cache", overflow="fold", ratio=1)
        table.add_column("answer", overflow="fold", ratio=3)
        for row in self.rows:
            said = Text(f"refused: {row.refusal}", "red")
            if row.answers:
                answer = row.answers[index]
                said = Text(answer.text.strip() or "(nothing)", "" if answer.agreement == 1 else "yellow")
            table.add_row(row.press, said)
        return table


def compare(
    file: Annotated[
        str | None,
        typer.Argument(help="Text to read; - for the standard input; left out, a novel that hides a number."),
    ] = None,
    question: Questions = None,
    press: Presses = None,
    model: Model = None,
    tokens: Annotated[int, typer.Option(help="How much of the novel to read.", min=LEAST_TOKENS)] = 1024,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 32,
    device: Device = None,
    dtype: Dtype = None,
    question_aware: QuestionAware = False,
) -> Comparison:
    """Ask the same questions under several presses: answers, agreement, bytes, seconds."""
    text = None if file is None else read_text(file)
    check_loading(model, device, dtype)
    from quantpress.cli.loading import load_pipeline, model_name
    from quantpress.evaluation.measuring import machine
    from quantpress.evaluation.sizing.kept_tokens import described
    from quantpress.evaluation.tasks.haystack import book_text, needle_question, plant, random_needles
    from quantpress.presses.expression import parse_press

    given = [parse_press(one) for one in press or DEFAULT_PRESSES]
    pipe = load_pipeline(model, device, dtype)
    asked = list(question or [])
    if text is None:
        (needle,) = random_needles(1)
        text = plant(book_text(), [needle], pipe.tokenizer, tokens)
        asked = asked or [needle_question(needle.city)]
    asked = asked or [""]
    rows: list[Compared] = []
    reference: list[list[int]] = []
    everything = [None, *(one for one in given if one is not None)]
    for one in progress(everything, "comparing", len(everything)):
        try:
            row, ids = _ask(pipe, text, asked, one, max_new_tokens, reference, question_aware)
        except QuantPressError as error:
            if one is None:
                raise
            row, ids = Compared(described(one), refusal=str(error)), []
        reference = reference or ids
        rows.append(row)
    return Comparison(model_name(pipe), machine(pipe), tuple(asked), tuple(rows), question_aware)


def _ask(
    pipe: "TextGenerationPipeline",
    text: str,
    questions: list[str],
    press: "BasePress | None",
    max_new_tokens: int,
    reference: list[list[int]],
    question_aware: bool,
) -> tuple[Compared, list[list[int]]]:
    """One row and the ids of its answers; an empty `reference` stands for these answers themselves."""
    from quantpress.evaluation.measuring import TokenClock
    from quantpress.evaluation.sizing.kept_tokens import described

    clock = TokenClock()
    result = pipe(
        text,
        questions=questions,
        press=press,
        max_new_tokens=max_new_tokens,
        streamer=clock,
        report=True,
        progress=False,
        question_aware=question_aware,
    )
    answers = []
    for said, ids, wanted in zip(result["answers"], clock.tokens, reference or clock.tokens, strict=True):
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b),
            min(len(ids), len(wanted)),
        )
        answers.append(Answer(said, len(ids), same, same / max(1, len(ids), len(wanted))))
    return Compared(described(press), tuple(answers), result["report"]), clock.tokens


def _figures(row: Compared) -> list[str]:
    from quantpress.pipelines.report import format_bytes

    report = row.report
    if report is None:
        return ["refused"]
    return [
        f"{row.agreement:.0%}",
        f"{report.tokens_kept:,.0f}",
        f"{report.bits_per_value:.2f}",
        format_bytes(report.resident_bytes),
        f"{report.ratio:.2f}x",
        f"{report.prefill_s + report.compress_s:.2f}",
        f"{report.decode_s:.2f}",
    ]
