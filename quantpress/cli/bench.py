"""`quantpress bench`: tokens a second, time to first token and peak memory of presses on this machine.

The text is a piece of a novel, the model's answer is as long as it is told to be. Everything goes through the
pipeline, so that it decodes as it would for a user. The uncompressed cache runs first, in the same process.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from kvpress import BasePress
from rich.table import Table

from quantpress.cli.loading import load_pipeline, machine, model_name
from quantpress.cli.output import progress
from quantpress.errors import InvalidInputError
from quantpress.evaluation.devices import devices_of
from quantpress.evaluation.sizing.kept_tokens import described
from quantpress.evaluation.tasks.haystack import book_piece
from quantpress.evaluation.token_clock import TokenClock, peak_memory
from quantpress.pipelines.report import Report, format_bytes
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses.expression import parse_press

SKIPPED = 4  # first tokens that do not count for tokens a second: kernels are compiled, graphs recorded
WARM_UP_TOKENS = 512
QUESTION = "\n\nWhat happens next?"


@dataclass(frozen=True)
class Side:
    """One press; the medians of its runs.

    Args:
        press: in words.
        first_token_s: from the text to the first new token.
        tokens_per_s: of the tokens after the first few.
        peak_bytes: most memory in use at a time beside the model's weights, reading included.
        report: of the last run.
    """

    press: str
    first_token_s: float
    tokens_per_s: float
    peak_bytes: int
    report: Report


@dataclass(frozen=True)
class Benchmark:
    """The uncompressed cache, then the presses.

    Args:
        model: its name.
        machine: device, dtype, threads and versions.
        new_tokens: of each answer.
        repeats: runs of each side.
        sides: one a press.
    """

    model: str
    machine: dict[str, Any]
    new_tokens: int
    repeats: int
    sides: tuple[Side, ...]

    exit_status = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; ratios are to the uncompressed cache."""
        return {
            "model": self.model,
            "machine": self.machine,
            "new_tokens": self.new_tokens,
            "repeats": self.repeats,
            "presses": [
                {**asdict(side), **self._ratios(side), "report": side.report.as_dict()} for side in self.sides
            ],
        }

    def _ratios(self, side: Side) -> dict[str, float]:
        plain = self.sides[0]
        return {
            "speed_ratio": side.tokens_per_s / plain.tokens_per_s,
            "first_token_ratio": side.first_token_s / plain.first_token_s,
        }

    def __rich__(self) -> Table:
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        table = Table(
            title=f"{self.model}: {self.sides[0].report.tokens_seen:,} tokens read, {self.new_tokens} new",
            caption=f"{machine}; medians of {self.repeats}. Peak: over what was in use "
            "before, reading included.",
        )
        table.add_column("cache", overflow="fold")
        for name in ("tokens/s", "", "first token", "", "peak", "cache bytes", ""):
            table.add_column(name, justify="right")
        for side in self.sides:
            ratios = self._ratios(side)
            table.add_row(
                side.press,
                f"{side.tokens_per_s:.1f}",
                f"{ratios['speed_ratio']:.2f}x",
                f"{side.first_token_s:.2f} s",
                f"{ratios['first_token_ratio']:.2f}x",
                format_bytes(side.peak_bytes),
                format_bytes(side.report.resident_bytes),
                f"{side.report.ratio:.2f}x",
            )
        return table


def main(
    presses: Sequence[str] = (),
    model: str | None = None,
    tokens: int = 2048,
    new_tokens: int = 32,
    repeats: int = 3,
    device: str | None = None,
    dtype: str | None = None,
) -> Benchmark:
    """Time presses against the uncompressed cache.

    Args:
        presses: as `parse_press` takes them; left out, TurboQuant.
        model: as for `load_pipeline`.
        tokens: length of the context.
        new_tokens: of each answer.
        repeats: runs of each side.
        device: as for `load_pipeline`.
        dtype: as for `load_pipeline`.

    Raises:
        InvalidInputError: an argument cannot be used.
    """
    if new_tokens < SKIPPED + 2:
        raise InvalidInputError(f"new_tokens is {new_tokens}; give at least {SKIPPED + 2} to time")
    made = [None, *(press for press in map(parse_press, presses or ("TurboQuant",)) if press is not None)]
    pipe = load_pipeline(model, device, dtype)
    text = book_piece(pipe.tokenizer, tokens)
    warm_up = book_piece(pipe.tokenizer, min(tokens, WARM_UP_TOKENS))
    for press in made:
        _once(pipe, warm_up, press, SKIPPED + 2)
    jobs = [
        (run, index) for run in range(repeats) for index in range(len(made))
    ]  # in turns: a machine may slow down
    runs: dict[int, list[tuple[float, float, int, Report]]] = {index: [] for index in range(len(made))}
    for _, index in progress(jobs, "timing", len(jobs)):
        runs[index].append(_once(pipe, text, made[index], new_tokens))
    sides = [
        Side(
            described(press),
            median(one[0] for one in runs[index]),
            median(one[1] for one in runs[index]),
            int(median(one[2] for one in runs[index])),
            runs[index][-1][3],
        )
        for index, press in enumerate(made)
    ]
    return Benchmark(model_name(pipe), machine(pipe), new_tokens, repeats, tuple(sides))


def _once(
    pipe: TextGenerationPipeline, text: str, press: BasePress | None, new_tokens: int
) -> tuple[float, float, int, Report]:
    """Seconds to the first token, tokens a second, peak bytes, report."""
    gc.collect()
    _give_back_memory(pipe.device)
    clock = TokenClock()
    with peak_memory(*devices_of(pipe)) as peak:
        begin = time.perf_counter()
        result = pipe(
            text,
            question=QUESTION,
            press=press,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            streamer=clock,
            report=True,
            progress=False,
        )
    times = clock.times[0]
    return (
        times[0] - begin,
        (len(times) - 1 - SKIPPED) / (times[-1] - times[SKIPPED]),
        peak.bytes,
        result["report"],
    )


def _give_back_memory(device: torch.device) -> None:
    """Freed memory that the allocator still holds would hide what the next run takes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    import ctypes
    import ctypes.util

    library = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(library), "malloc_trim", None) if library else None
    if trim is not None:  # glibc
        trim(0)
