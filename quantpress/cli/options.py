"""Options that several commands share, and sizes in bytes as they are written on a command line."""

import re
from typing import Annotated, Literal

import typer

from quantpress.errors import InvalidInputError

SYNTAX = 'such as "SnapKV(0.5) | TurboQuant(bits=3)"'

Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Id or folder of a model; left out, the default model.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Such as cuda:1 or cpu; auto spreads the model over all GPUs; left out, a GPU if any."),
]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="Dtype of the model; left out, the model's own."),
]
Press = Annotated[str, typer.Option("--press", "-p", help=f"What compresses the cache, {SYNTAX}.")]
Presses = Annotated[
    list[str] | None,
    typer.Option("--press", "-p", help=f"What compresses the cache, {SYNTAX}; may be repeated."),
]
Questions = Annotated[
    list[str] | None, typer.Option("--question", "-q", help="Asked after the text; may be repeated.")
]

UNITS = {"B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}


def byte_count(text: str) -> int:
    """Read a number of bytes with its unit: kB, MB, GB and TB go by 1000, KiB, MiB, GiB and TiB by 1024.

    Raises:
        InvalidInputError: `text` is not a number of bytes, or the unit is left out.

    Example:
        >>> byte_count("80GB"), byte_count("1.5 GiB"), byte_count("512 B")
        (80000000000, 1610612736, 512)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    if found is not None and not found[2]:
        raise InvalidInputError(
            f"{text!r} has no unit; write {found[1]}GB (10^9 bytes each) or {found[1]}GiB (2^30 bytes each)"
        )
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise InvalidInputError(f"{text!r} is not a number of bytes; write it like 80GB, 24GiB or 512MB")
    return int(float(found[1]) * units[found[2].lower()])
