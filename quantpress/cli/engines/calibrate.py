"""`quantpress calibrate`: measure what an engine has to know about a model, and save it."""

from dataclasses import dataclass
from typing import Annotated

import typer
from rich.text import Text

from quantpress.cli.arguments import Device, Dtype, check_loading, texts_and_output
from quantpress.cli.output import Outcome

BOOK = "Pride and Prejudice"


@dataclass(frozen=True)
class Calibrated(Outcome):
    """What was saved.

    Args:
        file: path of the file.
        model: name of the model.
        text: name of the text that it read.
        tokens: number of tokens that were counted.
        layers: number of layers with statistics.
        file_bytes: size of the file.
    """

    file: str
    model: str
    text: str
    tokens: int
    layers: int
    file_bytes: int

    def __rich__(self) -> Text:
        return Text(
            f"{self.file}: {self.file_bytes / 1000:,.0f} kB, keys of {self.layers} layers of {self.model}, "
            f"{self.tokens:,} tokens of {self.text}."
        )


def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="Id or folder of a model; left out, the default model.")
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "profile.safetensors",
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help=f"Text to read, - for the standard input; may be repeated; left out, {BOOK}.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to read, of all texts.", min=1024)] = 4096,
    piece_tokens: Annotated[
        int, typer.Option(help="Most tokens to read at a time: later positions are not seen.", min=64)
    ] = 2048,
    device: Device = None,
    dtype: Dtype = None,
) -> Calibrated:
    """Measure the statistics of a model's keys once, for engines that share pages between requests."""
    texts = texts_and_output(text, output)
    check_loading(model, device, dtype)
    from quantpress.cli.loading import load_pipeline
    from quantpress.evaluation.tasks.haystack import book_text
    from quantpress.pipelines.calibration import calibrate as measure

    pipe = load_pipeline(model, device, dtype)
    profile = measure(pipe.model, pipe.tokenizer, texts or {BOOK: book_text()}, tokens, piece_tokens)
    size = profile.save(output)
    return Calibrated(output, profile.model, profile.text, profile.tokens, len(profile.statistics), size)
