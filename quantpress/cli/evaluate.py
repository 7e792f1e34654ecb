"""`quantpress eval`: a suite on a model, and its files."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from quantpress.cli.arguments import Device, Dtype, Model, check_loading, check_output_folder
from quantpress.cli.output import Outcome
from quantpress.errors import InvalidInputError

PARTS = ("fidelity", "grid", "tasks")


@dataclass(frozen=True)
class Evaluated(Outcome):
    """What a run has found.

    Args:
        report: its tables, in Markdown.
        figures: the same as plain values.
    """

    report: str
    figures: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self.figures

    def __rich__(self) -> str:
        return self.report


def evaluate(
    suite: Annotated[
        Literal["quick", "full"], typer.Option(help="quick (two CPU cores, minutes) or full (a GPU).")
    ] = "quick",
    output: Annotated[
        Path | None, typer.Option(help="Folder for results; a run that stopped goes on there.")
    ] = None,
    model: Model = None,
    press: Annotated[
        list[str] | None,
        typer.Option(
            "--press", "-p", help='One more to compare, such as "SnapKV(0.5) | TurboQuant(bits=3)".'
        ),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help=f"Only this part, of {', '.join(PARTS)}; may be repeated.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    documents: Annotated[int | None, typer.Option(help="Pieces of the book to score.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of each that are read.", min=1)] = None,
    continuation: Annotated[
        int | None, typer.Option(help="Tokens that follow and are scored.", min=2)
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a needle's context; may be repeated.", min=1)
    ] = None,
    task_tokens: Annotated[int | None, typer.Option(help="Tokens of other tasks' contexts.", min=1)] = None,
    samples: Annotated[int | None, typer.Option(help="Cases of each other task.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Documents read at once on a GPU.", min=1)] = None,
    question_aware: Annotated[
        bool, typer.Option("--question-aware", help="Tasks: read the question in view of the press.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the tasks' texts and numbers.")] = 0,
    figures: Annotated[bool, typer.Option(help="Draw pictures; needs matplotlib.")] = True,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing: tables and pictures of the results there.")
    ] = False,
) -> Evaluated:
    """Measure quality, memory and answers of many cache compressions, with controls, on any model."""
    unknown = [one for one in part or () if one not in PARTS]
    if unknown:
        raise InvalidInputError(f"there is no part {unknown[0]!r}; use some of {', '.join(PARTS)}")
    if question_aware and "tasks" not in (part or PARTS):
        raise InvalidInputError(
            f"--question-aware has no effect on {', '.join(part or ())}, which ask no question; "
            "add --part tasks, or leave it out"
        )
    default = f"quantpress-eval-{suite}{'-question-aware' * question_aware}"
    folder = Path(default) if output is None else output
    check_output_folder(folder)
    if not report_only:
        check_loading(model, device, dtype)
    from quantpress.cli.loading import load_pipeline
    from quantpress.evaluation.evaluation import Evaluation
    from quantpress.evaluation.evaluation import evaluate as run
    from quantpress.evaluation.results.figures import check_matplotlib
    from quantpress.evaluation.results.records import RESULTS, Records

    sizes: dict[str, Any] = {
        "documents": documents,
        "context": context,
        "continuation": continuation,
        "lengths": tuple(length) if length else None,
        "task_tokens": task_tokens,
        "samples": samples,
        "batch": batch,
        "question_aware": question_aware or None,
    }
    if figures:
        check_matplotlib()
    if report_only:
        found = Evaluation.of(Records.read(folder / RESULTS))
    else:
        found = run(
            press or (),
            partial(load_pipeline, model, device, dtype),
            suite=suite,
            parts=part or PARTS,
            output=folder,
            seed=seed,
            **{name: size for name, size in sizes.items() if size is not None},
        )
    files = ", ".join(map(str, (found.records.path, *found.write(folder, figures=figures))))
    Console(stderr=True, soft_wrap=True).print(f"written: {files}", highlight=False)
    return Evaluated(str(found), found.as_dict())
