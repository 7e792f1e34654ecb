"""The command line: `quantpress COMMAND`, or `python -m quantpress COMMAND`.

A command is one function that says what its options are. What it does lives elsewhere and is imported when
the command runs, so that `quantpress --help` stays quick. docs/command_line.md is written from here.

options.py   options that several commands share; running a command
answer.py    demo, run, pack, compare: a text and questions about it
evaluate.py  eval: quality against controls
measure.py   memory, bench: bytes and seconds
check.py     inspect, validate, doctor, version: this model, the codec, this machine
"""

import sys
from collections.abc import Callable

import typer

import quantpress
from quantpress.cli import options_answer as answer
from quantpress.cli import options_check as check
from quantpress.cli import options_evaluate as evaluate
from quantpress.cli import options_measure as measure

EXIT_WRONG_INPUT = 2

app = typer.Typer(
    name="quantpress",
    help="Compress the KV cache of a transformer: evict with any press, then pack the rest in 2 to 4 bits.",
    epilog="A press is written as in Python: SnapKV(0.5), TurboQuant(bits=3), or both: "
    '"SnapKV(0.5) | TurboQuant(bits=3)". Exit status: 0 done, 1 a bound failed, 2 wrong input.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Every command in the order of --help: its name, its function, and the example that --help shows.
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "demo": (answer.demo, "quantpress demo --fast"),
    "run": (
        answer.run,
        'quantpress run book.txt -q "Who is Ada?" -q "Where?" -p "SnapKV(0.5) | TurboQuant(bits=3)"',
    ),
    "pack": (answer.pack, 'quantpress pack book.txt -o book.safetensors -p "TurboQuant(bits=3)"'),
    "compare": (
        answer.compare,
        'quantpress compare book.txt -q "Who is Ada?" -p "SnapKV(0.5)" -p "TurboQuant(bits=3)"',
    ),
    "eval": (evaluate.evaluate, 'quantpress eval --suite quick -p "SnapKV(0.5) | TurboQuant(bits=3)"'),
    "memory": (
        measure.memory,
        'quantpress memory config.json --context 131072 -p "TurboQuant(bits=3)" --gpu 80GB',
    ),
    "bench": (measure.bench, 'quantpress bench --tokens 4096 -p "TurboQuant(bits=3)"'),
    "inspect": (check.inspect, "quantpress inspect my-model-folder --tokens 2048"),
    "validate": (check.validate, "quantpress validate --bits 3 --head-dim 128"),
    "doctor": (check.doctor, "quantpress doctor --json"),
    "version": (check.version, "quantpress version"),
}
for _name, (_command, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example: {_example}")(_command)


def main() -> None:
    """Run the command line; the entry point of the script `quantpress`.

    What quantpress raises on purpose is meant for a person: one line on stderr, no traceback.
    """
    try:
        app()
    except quantpress.QuantPressError as error:
        print(f"quantpress: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_WRONG_INPUT)
