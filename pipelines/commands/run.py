"""`quantpress run`: questions about a text, or about a context that was packed before."""

from collections.abc import Sequence
from typing import Any

from quantpress.cache.cache_file import read_file
from quantpress.errors import InvalidInputError
from quantpress.pipelines.cached_context import CachedContext
from quantpress.pipelines.commands.loading import console, load_pipeline, model_name, print_json, read_text

DEFAULT_PRESS = "TurboQuant"


def main(
    file: str | None = None,
    questions: Sequence[str] = (),
    press: str | None = None,
    cache: str | None = None,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 50,
    json: bool = False,
) -> None:
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
        json: print JSON.

    Raises:
        QuantPressError: an argument cannot be used.
    """
    if (file is None) == (cache is None):
        raise InvalidInputError("give a text file, or --cache FILE for one that was packed before, not both")
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
    report = result["report"]
    if json:
        answers = [
            {"question": question, "answer": answer}
            for question, answer in zip(asked["questions"], result["answers"], strict=True)
        ]
        found = {"model": model_name(pipe), "press": description, "answers": answers}
        print_json(found | {"report": report.as_dict()})
        return
    shown = console()
    for question, answer in zip(asked["questions"], result["answers"], strict=True):
        if question:
            shown.print(question, style="bold", markup=False)
        shown.print(answer, markup=False, highlight=False)
    shown.print(report)
