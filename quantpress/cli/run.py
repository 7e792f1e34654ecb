"""`quantpress run`: questions about a text, or about a context that was packed before."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from quantpress.cli.arguments import (
    Device,
    Dtype,
    Model,
    QuestionAware,
    Questions,
    check_loading,
    check_packed,
    read_text,
)
from quantpress.cli.output import Outcome
from quantpress.errors import InvalidInputError

if TYPE_CHECKING:
    from quantpress.pipelines.report import Report

DEFAULT_PRESS = "TurboQuant"


@dataclass(frozen=True)
class Answered(Outcome):
    """Answers and what they cost.

    Args:
        model: name of the model.
        press: press under which the text was read.
        questions: questions, in order.
        answers: one for each question.
        report: what it cost.
        dtype: dtype of the model.
        question_aware: whether the press saw each question.
    """

    model: str
    press: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    report: "Report"
    dtype: str
    question_aware: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        pairs = zip(self.questions, self.answers, strict=True)
        answers = [{"question": question, "answer": answer} for question, answer in pairs]
        where: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "press": self.press}
        where["question_aware"] = self.question_aware
        return {**where, "answers": answers, "report": self.report.as_dict()}

    def __rich__(self) -> RenderableType:
        from quantpress.pipelines.report import ratio_note

        shown: list[RenderableType] = []
        for question, answer in zip(self.questions, self.answers, strict=True):
            shown += [Text(question, "bold")] if question else []
            shown += [Text(answer)]
        return Group(*shown, self.report, Text(ratio_note(self.dtype), "dim"))


def run(
    file: Annotated[str | None, typer.Argument(help="Text to read; - for the standard input.")] = None,
    question: Questions = None,
    press: Annotated[
        str | None,
        typer.Option("--press", "-p", help='Such as "SnapKV(0.5) | TurboQuant(bits=3)"; else TurboQuant.'),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(help="A context that `quantpress pack` wrote, or its URL, instead of a text."),
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 50,
    question_aware: QuestionAware = False,
) -> Answered:
    """Answer questions about a text, or about a context that was packed before."""
    if (file is None) == (cache is None):
        raise InvalidInputError("give a text file, or --cache FILE for one that was packed before, not both")
    if cache is not None and question_aware:
        raise InvalidInputError(
            f"{cache} was read without a question, and --question-aware reads both together: give the text"
        )
    text = None if file is None else read_text(file)
    if cache is not None:
        check_packed(cache)
    check_loading(model, device, dtype)
    from quantpress.cache.saved.format import read_description
    from quantpress.cli.loading import load_pipeline, model_name
    from quantpress.pipelines.contexts.cached_context import CachedContext
    from quantpress.pipelines.press_argument import as_press

    as_press(press)  # a wrong one is refused before a model is loaded
    if cache is not None:
        known = read_description(cache).get("model", {})
        model, dtype = model or known.get("name"), dtype or known.get("dtype")
        check_loading(model, None, dtype)
    pipe = load_pipeline(model, device, dtype)
    asked: dict[str, Any] = {"questions": question or [""], "max_new_tokens": max_new_tokens}
    if cache is not None:
        context: Any = CachedContext.load(cache, pipe.model)
        asked |= {} if press is None else {"press": press}
        description = context.description
    else:
        context, asked["press"], asked["question_aware"] = text, press or DEFAULT_PRESS, question_aware
        description = asked["press"]
    result = pipe(context, report=True, **asked)
    return Answered(
        model=model_name(pipe),
        press=description,
        questions=tuple(asked["questions"]),
        answers=tuple(result["answers"]),
        report=result["report"],
        dtype=str(pipe.model.dtype).removeprefix("torch."),
        question_aware=question_aware,
    )
