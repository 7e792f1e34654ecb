"""The command `quantpress`.

A new command is one function here that says what its options are. What it does lives elsewhere and is
imported when the command runs, so that `quantpress --help` stays quick.
"""

import sys
from importlib import import_module
from typing import Annotated

import typer

import quantpress

app = typer.Typer(
    name="quantpress",
    help="Compress the KV cache of a transformer: evict with any press, then pack the rest.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def demo(
    tokens: Annotated[int | None, typer.Option(help="Length of the context, in tokens.", min=1)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="A shorter context and fewer presses.")] = False,
) -> None:
    """Ask the default model about facts planted in a book, over the full cache and over compressed ones."""
    raise typer.Exit(
        import_module("quantpress.pipelines.demo").main(tokens=tokens, json=json, fast=fast) or 0
    )


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
