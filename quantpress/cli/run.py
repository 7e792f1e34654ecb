"""`quantpress run`: questions about a text, or about a context that was packed before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from quantpress.cache.saved.format import read_file
from quantpress.cli.loading import load_pipeline, model_name, read_text
from quantpress.errors import InvalidInputError
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.pipelines.press_argument import as_press
from quantpress.pipelines.report import Report

DEFAULT_PRESS = "TurboQuant"


@dataclass(frozen=True)
class Answered:
    """Answers and what they cost.

    Args:
        model: that answered.
        press: what the text was read under.
        questions: in order.
        answers: one a question.
        report: what it cost.
    """

    model: str
    press: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    report: Report

    exit_status = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        pairs = zip(self.questions, self.answers, strict=True)
        answers = [{"question": question, "answer": answer} for question, answer in pairs]
        return {"model": self.model, "press": self.press, "answers": answers, "report": self.report.as_dict()}

    def __rich__(self) -> RenderableType:
        shown: list[RenderableType] = []
        for question, answer in zip(self.questions, self.answers, strict=True):
            shown += [Text(question, "bold")] if question else []
            shown += [Text(answer)]
        return Group(*shown, self.report)


def main(
    file: str | None = None,
    questions: Sequence[str] = (),
    press: str | None = None,
    cache: str | None = None,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 50,
) -> Answered:
    """Answer questions and say what it cost.

    Args:
        file: of text; "-" for the standard input. None with `cache`.
        questions: none at all goes on from the context.
        press: as `parse_press` takes it; left out, `TurboQuant` for a text.
        cache: what `quantpress pack` wrote.
        model: as for `load_pipeline`; left out, with `cache`, the one that packed it.
        device: as for `load_pipeline`.
        dtype: as for `load_pipeline`; left out, with `cache`, that of the model that packed it.
        max_new_tokens: most tokens of an answer.

    Raises:
        QuantPressError: an argument cannot be used.
    """
    if (file is None) == (cache is None):
        raise InvalidInputError("give a text file, or --cache FILE for one that was packed before, not both")
    as_press(press)  # a wrong one is refused before a model is loaded
    text = None if file is None else read_text(file)
    if cache is not None:
        known = read_file(cache, verify=False)[0].get("model", {})
        model, dtype = model or known.get("name"), dtype or known.get("dtype")
    pipe = load_pipeline(model, device, dtype)
    asked: dict[str, Any] = {"questions": list(questions) or [""], "max_new_tokens": max_new_tokens}
    if cache is not None:
        context: Any = CachedContext.load(cache, pipe.model)
        asked |= {} if press is None else {"press": press}
        description = context.description
    else:
        context, asked["press"] = text, press or DEFAULT_PRESS
        description = asked["press"]
    result = pipe(context, report=True, **asked)
    return Answered(
        model_name(pipe), description, tuple(asked["questions"]), tuple(result["answers"]), result["report"]
    )
