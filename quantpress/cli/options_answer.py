"""Commands that read a text and answer questions about it."""

from typing import Annotated

import typer

from quantpress.cli.options import Device, Dtype, Json, Model, Press, Presses, Questions, run_command


def demo(
    tokens: Annotated[int | None, typer.Option(help="Length of the context, in tokens.", min=1)] = None,
    json: Json = False,
    fast: Annotated[bool, typer.Option("--fast", help="A shorter context and fewer presses.")] = False,
) -> None:
    """Ask the default model about facts planted in a book, over the full cache and over compressed ones."""
    from quantpress.evaluation.demo import main

    main(tokens=tokens, json=json, fast=fast)


def run(
    file: Annotated[str | None, typer.Argument(help="Text to read; - for the standard input.")] = None,
    question: Questions = None,
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
    run_command(
        "run",
        json,
        file=file,
        questions=question or [],
        press=press,
        cache=cache,
        model=model,
        device=device,
        dtype=dtype,
        max_new_tokens=max_new_tokens,
    )


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
    run_command("pack", json, file=file, output=output, press=press, model=model, device=device, dtype=dtype)


def compare(
    file: Annotated[
        str | None,
        typer.Argument(help="Text to read; - for the standard input; left out, a novel that hides a number."),
    ] = None,
    question: Questions = None,
    press: Presses = None,
    model: Model = None,
    tokens: Annotated[int, typer.Option(help="How much of the novel to read.", min=1)] = 1024,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 32,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Ask the same questions under several presses: answers, agreement, bytes, seconds."""
    run_command(
        "compare",
        json,
        file=file,
        questions=question or [],
        presses=press or [],
        model=model,
        tokens=tokens,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
    )
