"""Commands that look at a model, at the codec, and at this machine."""

from typing import Annotated

import typer

import quantpress
from quantpress.cli.options import Device, Dtype, Json, run_command


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Id or folder of a model; left out, the default model.")
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Text for the model to read; left out, a piece of a novel.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to read.", min=8)] = 1024,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Look at a model: which layers will be packed, which not and why, its keys, a setting for it."""
    run_command("inspect", json, model=model, file=file, tokens=tokens, device=device, dtype=dtype)


def validate(
    bits: Annotated[
        list[float] | None, typer.Option(help="Code width, such as 3 or 2.5; may be repeated; else all.")
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option(help="Dimension of the vectors; may be repeated; else 64, 128, 256.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Vectors for each codec.", min=1)] = 4096,
    seed: Annotated[int, typer.Option(help="Of the vectors.")] = 0,
    rotation: Annotated[str, typer.Option(help="hadamard, haar or identity.")] = "hadamard",
    scale: Annotated[str, typer.Option(help="auto, norm_corrected, unbiased or norm.")] = "auto",
    codebook: Annotated[str, typer.Option(help="int8 or lloyd_max.")] = "int8",
    estimator: Annotated[str, typer.Option(help="mse or prod.")] = "mse",
    json: Json = False,
) -> None:
    """Measure the codec against theory on random vectors; exit status 1 when a bound fails."""
    wanted = {"bits": bits, "head_dims": head_dim}
    run_command(
        "validate",
        json,
        **{name: value for name, value in wanted.items() if value},
        samples=samples,
        seed=seed,
        rotation=rotation,
        scale=scale,
        codebook=codebook,
        estimator=estimator,
    )


def doctor(json: Json = False) -> None:
    """Print versions, devices and kernels, what falls back to plain PyTorch here, and why."""
    from quantpress.cli.output import perform
    from quantpress.doctor import diagnose

    raise typer.Exit(perform(diagnose, json, {}))


def version() -> None:
    """Print the version."""
    typer.echo(quantpress.__version__)
