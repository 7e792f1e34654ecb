"""Commands that say what a press costs and saves."""

from typing import Annotated

import typer

from quantpress.cli.options import Device, Dtype, Json, Model, Presses, run_command


def memory(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Id, folder, config.json, or a shape such as layers=32,kv_heads=8,head_dim=128; left out, "
            "the default model."
        ),
    ] = None,
    press: Presses = None,
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens of each sequence.", min=1)] = 131072,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Sequences.", min=1)] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="Memory of a GPU, such as 80GB: also print the longest context and largest batch."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bytes of the weights where the configuration is wrong, such as 4.7GB.")
    ] = None,
    json: Json = False,
) -> None:
    """Say what a cache will weigh, part by part, before a model is loaded."""
    run_command(
        "memory",
        json,
        model=model,
        presses=press or [],
        context=context,
        batch=batch,
        gpu=gpu,
        weights=weights,
    )


def bench(
    press: Presses = None,
    model: Model = None,
    tokens: Annotated[int, typer.Option(help="Length of the context.", min=1)] = 2048,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of each press, of which the median counts.", min=1)] = 3,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Time presses against the full cache on this machine: tokens a second, first token, peak memory."""
    run_command(
        "bench",
        json,
        presses=press or [],
        model=model,
        tokens=tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        device=device,
        dtype=dtype,
    )
