"""The command line: `quantpress COMMAND`, or `python -m quantpress COMMAND`.

A command is one function that says what its options are. What it does lives elsewhere and is
imported when the command runs, so that `quantpress --help` stays quick.
"""

import sys
from importlib import import_module
from typing import Annotated, Any

import typer

import quantpress
from quantpress.evaluate import evaluate

app = typer.Typer(
    name="quantpress",
    help="Compress the KV cache of a transformer: evict with any press, then pack the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Id or folder of a model; left out, the default model.")
]
Device = Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu; left out, a GPU if any.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; left out, the model's own.")]
Press = Annotated[str, typer.Option("--press", "-p", help='Such as "SnapKV(0.5) | TurboQuant(bits=3)".')]


@app.command()
def demo(
    tokens: Annotated[int | None, typer.Option(help="Length of the context, in tokens.", min=1)] = None,
    json: Json = False,
    fast: Annotated[bool, typer.Option("--fast", help="A shorter context and fewer presses.")] = False,
) -> None:
    """Ask the default model about facts planted in a book, over the full cache and over compressed ones."""
    _run("quantpress.pipelines.demo", tokens=tokens, json=json, fast=fast)


@app.command()
def run(
    file: Annotated[str | None, typer.Argument(help="Text to read; - for the standard input.")] = None,
    question: Annotated[
        list[str] | None, typer.Option("--question", "-q", help="Asked after the text; may be repeated.")
    ] = None,
    press: Annotated[
        str | None,
        typer.Option("--press", "-p", help='Such as "SnapKV(0.5) | TurboQuant(bits=3)"; else TurboQuant.'),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="A context that `quantpress pack` wrote, instead of a text.")
    ] = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 50,
    json: Json = False,
) -> None:
    """Answer questions about a text, or about a context that was packed before."""
    _run(
        "quantpress.pipelines.commands.run",
        file=file,
        questions=question or [],
        press=press,
        cache=cache,
        model=model,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
        json=json,
    )


@app.command()
def pack(
    file: Annotated[str, typer.Argument(help="Text to read; - for the standard input.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File to write; left out, FILE.kv.safetensors.")
    ] = None,
    press: Press = "TurboQuant",
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Read a text once and save its packed cache, for `run --cache`. The file contains the text."""
    _run(
        "quantpress.pipelines.commands.pack",
        file=file,
        output=output,
        press=press,
        model=model,
        device=device,
        dtype=dtype,
        json=json,
    )


app.command(name="eval")(evaluate)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(quantpress.__version__)


@app.command()
def doctor() -> None:
    """Print versions, devices and the attention path that a packed cache takes on this machine."""
    from quantpress.doctor import diagnose

    found = diagnose()
    for package, installed in found.versions.items():
        typer.echo(f"{package:<14}{installed or 'not installed'}")
    typer.echo(f"{'system':<14}{found.system}")
    typer.echo(f"{'cuda':<14}{found.cuda or 'torch is a CPU build'}")
    for device in found.devices:
        typer.echo(f"{'device':<14}{device.name}, sm {device.capability}, {device.memory / 2**30:.0f} GiB")
    for operation, backends in found.backends.items():
        typer.echo(f"{operation:<14}{', '.join(backends)}")
    for line in found.attention:
        typer.echo(f"{'attention':<14}{line}")


def main() -> None:
    """Run the command line; the entry point of the script `quantpress`.

    What quantpress raises on purpose is meant for a person: one line and exit status 1, no traceback.
    """
    try:
        app()
    except quantpress.QuantPressError as error:
        sys.exit(f"quantpress: {error}")


def _run(module: str, **options: Any) -> None:
    """Run `main` of a module, whose result is the exit status."""
    raise typer.Exit(import_module(module).main(**options) or 0)
