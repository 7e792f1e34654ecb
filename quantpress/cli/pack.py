"""`quantpress pack`: read a text once and save the packed context."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from quantpress.cli.arguments import (
    STDIN,
    Device,
    Dtype,
    Model,
    Press,
    check_loading,
    check_output_file,
    is_url,
    read_text,
)
from quantpress.cli.output import Outcome
from quantpress.errors import InvalidInputError

SUFFIX = ".kv.safetensors"


@dataclass(frozen=True)
class Packed(Outcome):
    """What was saved.

    Args:
        file: path of the file.
        model: name of the model that read the text.
        press: press under which it was read.
        tokens: tokens of the context.
        file_bytes: size of the file.
        resident_bytes: bytes of the cache in memory.
        uncompressed_bytes: bytes of the kept tokens uncompressed, in the model's own dtype.
        bits_per_value: true bits per kept number.
    """

    file: str
    model: str
    press: str
    tokens: int
    file_bytes: int
    resident_bytes: int
    uncompressed_bytes: int
    bits_per_value: float

    def __rich__(self) -> Text:
        from quantpress.pipelines.report import format_bytes

        press = f"under {self.press}" if self.press != "None" else "without a press"
        return Text(
            f"{self.file}: {self.tokens:,} tokens in {format_bytes(self.file_bytes)}, "
            f"{self.bits_per_value:.2f} bits a value, read by {self.model} {press}. It contains the text: "
            "only you can read it."
        )


def pack(
    file: Annotated[str, typer.Argument(help="Text to read; - for the standard input.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="File or URL to write; left out, FILE.kv.safetensors."),
    ] = None,
    press: Press = "TurboQuant",
    model: Model = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Packed:
    """Read a text once and save its packed cache, for `run --cache`. The file contains the text."""
    if output is None and file == STDIN:
        raise InvalidInputError("text from the standard input has no name; give --output FILE")
    target = f"{file}{SUFFIX}" if output is None else output
    text = read_text(file)
    check_output_file(target)
    if file != STDIN and not is_url(target) and Path(target).exists() and Path(target).samefile(file):
        raise InvalidInputError(f"{target} is the text itself; give --output another name")
    check_loading(model, device, dtype)
    from quantpress.cli.loading import load_pipeline, model_name
    from quantpress.pipelines.contexts.cached_context import check_saved
    from quantpress.presses.expression import parse_press

    made = parse_press(press)
    check_saved(made)
    pipe = load_pipeline(model, device, dtype)
    context = pipe.read(text, press=made)
    size, memory = context.save(target), context.memory
    return Packed(
        file=target,
        model=model_name(pipe),
        press=context.description,
        tokens=context.token_ids.shape[1],
        file_bytes=size,
        resident_bytes=memory.total_bytes,
        uncompressed_bytes=memory.uncompressed_bytes,
        bits_per_value=memory.bits_per_value,
    )
