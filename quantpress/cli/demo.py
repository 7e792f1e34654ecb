"""`quantpress demo`: a fact in a book, asked for over the whole cache and over compressed ones."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from quantpress.cli.arguments import check_loading
from quantpress.cli.output import Outcome

if TYPE_CHECKING:
    import torch

    from quantpress.evaluation.demo import Row

TOKENS = 4096
FAST_TOKENS = 2048
LEAST_TOKENS, MOST_TOKENS = 128, 8192  # a fact fits; positions of the default model
DEPTHS = 3
PRESSES = ("none", "TurboQuant", "Compactor | TurboQuant", "SnapKV | TurboQuant", "StreamingLLM | TurboQuant")
FAST_PRESSES = PRESSES[:3]


@dataclass(frozen=True)
class Demonstrated(Outcome):
    """What was asked and answered, and where.

    Args:
        model: name of the model.
        dtype: dtype of the model.
        device: type of its device.
        threads: threads of torch.
        seconds: time for everything, loading included.
        rows: one for each press.
    """

    model: str
    dtype: "torch.dtype"
    device: str
    threads: int
    seconds: float
    rows: "list[Row]"

    @property
    def dtype_name(self) -> str:
        """The dtype without "torch."."""
        return str(self.dtype).removeprefix("torch.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "dtype": self.dtype_name,
            "device": self.device,
            "threads": self.threads,
            "seconds": self.seconds,
            "rows": [
                {"cache": row.press, "trials": [trial.as_dict() for trial in row.trials]} for row in self.rows
            ],
        }

    def __rich__(self) -> RenderableType:
        from quantpress.evaluation.demo import table

        note = (
            f"{self.model} in {self.dtype_name} on {self.device}, {self.threads} threads, "
            f"{self.seconds:.0f} s in all. Bits, bytes and ratio are measured from what the cache keeps."
        )
        return Group(table(self.rows, self.dtype), Text(note, "dim"))


def demo(
    tokens: Annotated[
        int | None, typer.Option(help="Length of the context, in tokens.", min=LEAST_TOKENS, max=MOST_TOKENS)
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A shorter context and fewer presses.")] = False,
) -> Demonstrated:
    """Ask the default model about facts planted in a book, over the full cache and over compressed ones."""
    check_loading(None, None, None)
    import torch

    from quantpress.cli.loading import load_pipeline, model_name
    from quantpress.evaluation.demo import run_trials
    from quantpress.presses.expression import parse_press

    begin = time.perf_counter()
    pipe = load_pipeline(None)
    short = fast or pipe.model.dtype == torch.float32  # of a machine without fast bfloat16
    # A press may keep state from one context to the next, so every question gets a new one.
    presses = [lambda text=text: parse_press(text) for text in (FAST_PRESSES if fast else PRESSES)]
    rows = run_trials(pipe, tokens or (FAST_TOKENS if short else TOKENS), DEPTHS, presses)
    where = (pipe.model.dtype, pipe.device.type, torch.get_num_threads())
    return Demonstrated(model_name(pipe), *where, time.perf_counter() - begin, rows)
