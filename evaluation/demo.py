"""The main job in one table: a fact in a book, asked for over the whole cache and over compressed ones.

A slice of Pride and Prejudice is read once for every depth and every press, with one fact at that depth.
Presses that evict without knowing the question may drop it; the table shows what happened, and what each
cache really takes.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantpress.evaluation.trials import MakePress, Row, Trial, run
from quantpress.pipelines import TASK, register
from quantpress.pipelines.default_model import DEFAULT_MODEL_NAME, ensure_default_model, quick_dtype
from quantpress.pipelines.report import format_bytes
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Compactor, Compose, SnapKV, StreamingLLM, TurboQuant

TOKENS, DEPTHS = 4096, 3
FAST_TOKENS, FAST_DEPTHS = 2048, 3
PRESSES: tuple[MakePress, ...] = (
    lambda: None,
    TurboQuant,
    lambda: Compose([Compactor, TurboQuant]),
    lambda: Compose([SnapKV, TurboQuant]),
    lambda: Compose([StreamingLLM, TurboQuant]),
)
FAST_PRESSES = PRESSES[:3]


def main(tokens: int | None = None, json: bool = False, fast: bool = False) -> None:
    """Run the demo on the default model and print its table.

    Args:
        tokens: length of the context; left out, 4096, or 2048 with `fast` or in float32.
        json: print one JSON object instead, to stdout.
        fast: a shorter context, fewer depths and fewer presses.

    Raises:
        InvalidInputError: there is no room for a fact, the book has fewer tokens, or `QUANTPRESS_DTYPE` names
            no dtype.
        ModelFilesError: the default model could not be fetched.
    """
    begin = time.perf_counter()
    pipe = default_pipeline()
    short = fast or pipe.model.dtype == torch.float32
    tokens = tokens or (FAST_TOKENS if short else TOKENS)
    presses = FAST_PRESSES if fast else PRESSES
    rows = run(pipe, tokens, FAST_DEPTHS if fast else DEPTHS, presses)
    seconds = time.perf_counter() - begin
    if json:
        Console(soft_wrap=True).print_json(data=as_dict(rows, pipe, seconds))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=90)
    console.print(table(rows, pipe.model.dtype))
    where = f"{dtype_name(pipe.model.dtype)} on {pipe.device.type}"
    console.print(
        f"{DEFAULT_MODEL_NAME} in {where}, {torch.get_num_threads()} threads, {seconds:.0f} s in all. Bits, "
        "bytes and ratio are measured from what the cache keeps.",
        style="dim",
    )


def default_pipeline(dtype: torch.dtype | None = None) -> TextGenerationPipeline:
    """Our pipeline of the default model.

    Args:
        dtype: of the model; None for what `quick_dtype` chooses.

    Raises:
        InvalidInputError: `QUANTPRESS_DTYPE` names no dtype.
        ModelFilesError: the default model could not be fetched.
    """
    register()
    folder = ensure_default_model()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        make: Any = transformers.pipeline
        pipe: TextGenerationPipeline = make(TASK, model=str(folder), dtype=dtype or quick_dtype())
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    return pipe


def table(rows: Sequence[Row], dtype: torch.dtype) -> Table:
    """The rows for people: answers by depth, then what the cache takes.

    Args:
        rows: of `run`.
        dtype: of the model, in which an uncompressed cache has its numbers.
    """
    first, name = rows[0], dtype_name(dtype)
    shown = Table(
        title=f"A number hidden in {first.mean('tokens_seen'):,.0f} tokens of Pride and Prejudice",
        caption="All that a cache keeps counts: codes, scales, and the first and last tokens, which stay in "
        f"{name} ({8 * dtype.itemsize} bits). Ratio: how many times less memory that is than all tokens "
        f"read, uncompressed in {name}.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    shown.add_column("cache", overflow="fold")
    for trial in first.trials:
        shown.add_column(f"at {trial.needle.depth:.0%}\n{trial.needle.number}", no_wrap=True)
    for head in ("bits a\nvalue", "\nresident", "\nratio", "time\ns"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.press.replace(" | ", "\n| "),
            *(_verdict(trial) for trial in row.trials),
            f"{row.mean('bits_per_value'):.2f}",
            format_bytes(round(row.mean("resident_bytes"))),
            f"{row.mean('ratio'):.2f}x",
            f"{row.seconds:.1f}",
        )
    return shown


def as_dict(rows: Sequence[Row], pipe: TextGenerationPipeline, seconds: float) -> dict[str, Any]:
    """Everything measured, as plain values for JSON."""
    return {
        "model": DEFAULT_MODEL_NAME,
        "dtype": dtype_name(pipe.model.dtype),
        "device": pipe.device.type,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "rows": [
            {"cache": row.press, "trials": [_trial_dict(trial) for trial in row.trials]} for row in rows
        ],
    }


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _verdict(trial: Trial) -> Text:
    return Text(f"{'✓' if trial.right else '✗'}{trial.said}", "green" if trial.right else "red")


def _trial_dict(trial: Trial) -> dict[str, Any]:
    asked = {"depth": trial.needle.depth, "city": trial.needle.city, "number": trial.needle.number}
    return asked | {"answer": trial.answer, "right": trial.right, "report": trial.report.as_dict()}
