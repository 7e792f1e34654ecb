"""Options that several commands share, and how a command is run."""

from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer

SYNTAX = 'such as "SnapKV(0.5) | TurboQuant(bits=3)"'

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Id or folder of a model; left out, the default model.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Such as cuda:1 or cpu; auto spreads the model over all GPUs; left out, a GPU if any."),
]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; left out, the model's own.")]
Press = Annotated[str, typer.Option("--press", "-p", help=f"What compresses the cache, {SYNTAX}.")]
Presses = Annotated[
    list[str] | None,
    typer.Option("--press", "-p", help=f"What compresses the cache, {SYNTAX}; may be repeated."),
]
Questions = Annotated[
    list[str] | None, typer.Option("--question", "-q", help="Asked after the text; may be repeated.")
]


def run_command(name: str, json: bool, **options: Any) -> NoReturn:
    """Run `main` of a module of `quantpress.cli`, show what it returns, and exit.

    Args:
        name: of the module.
        json: print JSON.
        **options: of `main`.
    """
    main = import_module(f"quantpress.cli.{name}").main
    perform = import_module("quantpress.cli.output").perform
    raise typer.Exit(perform(main, json, options))
