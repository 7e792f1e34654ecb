"""The command line: `quantpress COMMAND`, or `python -m quantpress COMMAND`.

Each command is one function in a file of its own, whose signature declares the options and whose return value
knows how to show itself (`output.py`); `serve` and `version` return nothing and print. Functions import what
they need when they are called, so that `quantpress --help` stays quick. The site's page of commands is
written from here.

A new command is a file and a line in `COMMANDS`.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

import quantpress
from quantpress.cli import (
    bench,
    compare,
    demo,
    doctor,
    evaluate,
    inspect,
    memory,
    pack,
    run,
    serve,
    validate,
)
from quantpress.cli.batch import command
from quantpress.cli.engines import calibrate
from quantpress.cli.models import fit
from quantpress.cli.output import with_json

EXIT_WRONG_INPUT = 2

app = typer.Typer(
    name="quantpress",
    help="Compress the KV cache of a transformer: evict with any press, then pack the rest in 2 to 4 bits.",
    epilog="A press is written as in Python: SnapKV(0.5), TurboQuant(bits=3), or both: "
    '"SnapKV(0.5) | TurboQuant(bits=3)"; one of your own with its module: "my_module:MyPress(0.5)". Exit '
    "status: 0 done, 1 a bound or a document failed, 2 wrong input.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def version() -> None:
    """Print the version."""
    typer.echo(quantpress.__version__)


def _version_first(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version_first, is_eager=True)
    ] = False,
) -> None:
    """Options of `quantpress` itself, which stand before the command."""


# Commands in the order of --help: name, function, and the example that --help shows.
COMMANDS: dict[str, tuple[Callable[..., Any], str]] = {
    "demo": (demo.demo, "quantpress demo --fast"),
    "run": (
        run.run,
        'quantpress run book.txt -q "Who is Ada?" -q "Where?" -p "SnapKV(0.5) | TurboQuant(bits=3)"',
    ),
    "pack": (pack.pack, 'quantpress pack book.txt -o book.safetensors -p "TurboQuant(bits=3)"'),
    "batch": (
        command.batch,
        'quantpress batch documents --questions questions.txt --out answers.jsonl -p "TurboQuant(bits=3)"',
    ),
    "serve": (serve.serve, "quantpress serve my-model-folder -p \"TurboQuant.preset('balanced')\""),
    "compare": (
        compare.compare,
        'quantpress compare book.txt -q "Who is Ada?" -p "SnapKV(0.5)" -p "TurboQuant(bits=3)"',
    ),
    "eval": (evaluate.evaluate, 'quantpress eval --suite quick -p "SnapKV(0.5) | TurboQuant(bits=3)"'),
    "memory": (
        memory.memory,
        'quantpress memory llama-3.1-8b --context 131072 -p "TurboQuant(bits=3)" --gpu 80GB',
    ),
    "bench": (bench.bench, 'quantpress bench --tokens 4096 -p "TurboQuant(bits=3)"'),
    "fit": (fit.fit, "quantpress fit my-model-folder --bits 2.5 -o plan.json"),
    "calibrate": (calibrate.calibrate, "quantpress calibrate my-model-folder -o profile.safetensors"),
    "inspect": (inspect.inspect, "quantpress inspect my-model-folder --tokens 2048"),
    "validate": (validate.validate, "quantpress validate --bits 3 --head-dim 128"),
    "doctor": (doctor.doctor, "quantpress doctor --json"),
    "version": (version, "quantpress version"),
}
for _name, (_work, _example) in COMMANDS.items():
    _command = _work if _work in (version, serve.serve) else with_json(_work)
    app.command(_name, epilog=f"Example: {_example}")(_command)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any, **named: Any
) -> None:
    name = "" if category is UserWarning else f"{category.__name__}: "
    print(f"quantpress: warning: {name}{message}", file=sys.stderr)  # noqa: T201


def main() -> None:
    """Run the command line; the entry point of the script `quantpress`.

    What quantpress raises on purpose, or warns of, is meant for a person: one line on stderr, no traceback
    and no line of code.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except quantpress.QuantPressError as error:
        print(f"quantpress: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_WRONG_INPUT)
