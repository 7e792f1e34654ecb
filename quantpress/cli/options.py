"""Options that several commands share."""

from typing import Annotated

import typer

SYNTAX = 'such as "SnapKV(0.5) | TurboQuant(bits=3)"'

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
