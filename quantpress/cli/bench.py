"""`quantpress bench`: tokens a second, time to first token and peak memory of presses on this machine.

The text is a piece of a novel, and the model answers as many tokens as it is told to. Everything goes
through the pipeline, so that it decodes as it does for a user. The uncompressed cache runs first, in the same
process.
"""

import gc
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from quantpress.cli.arguments import Device, Dtype, Model, Presses, check_loading
from quantpress.cli.output import Outcome, new_table, one_below_the_other, progress

if TYPE_CHECKING:
    from quantpress.pipelines.report import Report
    from quantpress.pipelines.text_generation import TextGenerationPipeline
    from quantpress.presses.base_press import BasePress

SKIPPED = 4  # first tokens that tokens a second leaves out: kernels are compiled, graphs captured
WARM_UP_TOKENS = 512
QUESTION = "\n\nWhat happens next?"


@dataclass(frozen=True)
class Side:
    """One press: medians of its runs.

    Args:
        press: as it is written.
        first_token_s: seconds from the text to the first new token.
        tokens_per_s: decoding speed, without the first few tokens.
        peak_bytes: peak memory beside the model's weights, reading included.
        report: report of the last run.
    """

    press: str
    first_token_s: float
    tokens_per_s: float
    peak_bytes: int
    report: "Report"


@dataclass(frozen=True)
class Benchmark(Outcome):
    """The uncompressed cache, then the presses.

    Args:
        model: name of the model.
        machine: device, dtype, threads and versions.
        new_tokens: length of each answer.
        repeats: runs of each side.
        sides: one for each press.
    """

    model: str
    machine: dict[str, Any]
    new_tokens: int
    repeats: int
    sides: tuple[Side, ...]

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
        from quantpress.pipelines.report import format_bytes, ratio_note

        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        table = new_table(
            f"{self.model}: {self.sides[0].report.tokens_seen:,} tokens read, {self.new_tokens} new",
            ("cache", "tokens/s", "", "first\ntoken", "", "peak", "cache\nbytes", ""),
            words=("cache",),
            caption=f"{machine}; medians of {self.repeats}. Peak: over what was in use "
            f"before, reading included. {ratio_note(self.machine['dtype'])}",
        )
        for side in self.sides:
            ratios = self._ratios(side)
            table.add_row(
                one_below_the_other(side.press),
                f"{side.tokens_per_s:.1f}",
                f"{ratios['speed_ratio']:.2f}x",
                f"{side.first_token_s:.2f} s",
                f"{ratios['first_token_ratio']:.2f}x",
                format_bytes(side.peak_bytes),
                format_bytes(side.report.resident_bytes),
                f"{side.report.ratio:.2f}x",
            )
        return table


def bench(
    press: Presses = None,
    model: Model = None,
    tokens: Annotated[int, typer.Option(help="Length of the context.", min=1)] = 2048,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=SKIPPED + 2)] = 32,
    repeats: Annotated[int, typer.Option(help="Runs of each press, of which the median counts.", min=1)] = 3,
    device: Device = None,
    dtype: Dtype = None,
) -> Benchmark:
    """Time presses against the full cache on this machine: tokens a second, first token, peak memory."""
    check_loading(model, device, dtype)
    from quantpress.cli.loading import load_pipeline, model_name
    from quantpress.evaluation.measuring import machine
    from quantpress.evaluation.sizing.kept_tokens import described
    from quantpress.evaluation.tasks.haystack import book_piece
    from quantpress.presses.expression import parse_press

    made = [None, *(one for one in map(parse_press, press or ("TurboQuant",)) if one is not None)]
    pipe = load_pipeline(model, device, dtype)
    text = book_piece(pipe.tokenizer, tokens)
    warm_up = book_piece(pipe.tokenizer, min(tokens, WARM_UP_TOKENS))
    for one in made:
        _timed(pipe, warm_up, one, SKIPPED + 2)
    jobs = [(run, index) for run in range(repeats) for index in range(len(made))]  # in turns: speed drifts
    runs: list[list[tuple[float, float, int, Report]]] = [[] for _ in made]
    for _, index in progress(jobs, "timing", len(jobs)):
        runs[index].append(_timed(pipe, text, made[index], new_tokens))
    sides = []
    for one, timed in zip(made, runs, strict=True):
        first, speed, peak, reports = zip(*timed, strict=True)
        sides.append(Side(described(one), median(first), median(speed), int(median(peak)), reports[-1]))
    return Benchmark(model_name(pipe), machine(pipe), new_tokens, repeats, tuple(sides))


def _timed(
    pipe: "TextGenerationPipeline", text: str, press: "BasePress | None", new_tokens: int
) -> "tuple[float, float, int, Report]":
    """Seconds to the first token, tokens a second, peak bytes, report."""
    from quantpress.evaluation.measuring import TokenClock, devices_of, give_back_memory, peak_memory

    gc.collect()
    give_back_memory(pipe.device)
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
    speed = (len(times) - 1 - SKIPPED) / (times[-1] - times[SKIPPED])
    return times[0] - begin, speed, peak.bytes, result["report"]
