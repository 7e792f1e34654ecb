"""The options of `quantpress eval`; what it does is in `quantpress.cli.evaluate`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from quantpress.cli.options import Device, Dtype, Json, Model

PARTS = ["fidelity", "grid", "tasks"]


def evaluate(
    suite: Annotated[str, typer.Option(help="quick (two CPU cores, minutes) or full (a GPU).")] = "quick",
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
    seed: Annotated[int, typer.Option(help="Of the tasks' texts and numbers.")] = 0,
    figures: Annotated[bool, typer.Option(help="Draw pictures; needs matplotlib.")] = True,
    json: Json = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Measure nothing: tables and pictures of the results there.")
    ] = False,
) -> None:
    """Measure quality, memory and answers of many cache compressions, with controls, on any model."""
    sizes: dict[str, Any] = {
        "documents": documents,
        "context": context,
        "continuation": continuation,
        "lengths": tuple(length) if length else None,
        "task_tokens": task_tokens,
        "samples": samples,
        "batch": batch,
    }
    import_module("quantpress.cli.evaluate").main(
        suite,
        output,
        presses=press or [],
        model=model,
        parts=part or PARTS,
        device=device,
        dtype=dtype,
        sizes={name: size for name, size in sizes.items() if size is not None},
        seed=seed,
        figures=figures,
        json=json,
        report_only=report_only,
    )
