"""Answers over compressed caches, with the question read after the press has chosen tokens, and before.

    python benchmarks/question_in_view.py --json view.json                       the default model
    python benchmarks/question_in_view.py --press "SnapKV(0.25) | TurboQuant(4)"
    python benchmarks/question_in_view.py --share 0.2 --documents 4    every way to use every evictor, in
                                                                         a fifth of the bytes

A five-digit number is planted in a book, at as many depths as there are cases, and asked for. `blind`: the
question follows a context that was compressed without it, as in `pipe(context, question=question)`. `in
view`: the press sees the question, as in `pipe(context, question=question, question_aware=True)`. The prompts
are the same. A case is right when the answer contains the number.

With `--share`, a press is given as "SnapKV({}) | TurboQuant(4)": in place of {} it gets the ratio at which
the first case's context takes this share of the bytes of an uncompressed cache. With `--documents`, `KL` is
the divergence from the uncompressed model over a continuation of 128 tokens, in nats: the mean of pieces of
the book as long as the cases, which the press reads with no question.

Results are kept in --output, and a run that was interrupted goes on from there.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import track

from quantpress.cli.loading import load_pipeline, model_name
from quantpress.evaluation.arms import UNCOMPRESSED, Arm
from quantpress.evaluation.divergence.documents import make_documents
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.measuring import machine
from quantpress.evaluation.results.markdown import table
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.tasks.cases import Case
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.evaluation.tasks.needle_tasks import needle
from quantpress.evaluation.tasks.task_runs import TaskResult, ask
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses.expression import parse_press

EVICTORS = (
    *("SnapKV({})", "ChunkKV(SnapKV({}))", "ExpectedAttention({})", "KVzip({})", "Compactor({})"),
    *("KeyDiff({})", "StreamingLLM({})"),
)
PRESSES = (
    *("TurboQuant(4)", "TurboQuant(2)", *(f"{one} | TurboQuant(4)".format(0.5) for one in EVICTORS)),
    *("ChunkKV(SnapKV(0.5)) | TurboQuant(3)", "ChunkKV(SnapKV(0.7)) | TurboQuant(4)"),
    "Demote(SnapKV(0.5), bits=2) | TurboQuant(4)",
)
FORMS = (
    *("{}", "{} | TurboQuant(4)", "Demote({}, bits=2) | TurboQuant(4)", "Demote({}, bits=1) | TurboQuant(4)"),
)
WITHOUT_SCORES = "KVzip({})"
"""Names tokens when all of the context was read, and has no scores before: `Demote` takes no such press."""
GRID = (
    *("TurboQuant(4)", "TurboQuant(3)", "TurboQuant(2)", "ChunkKV(SnapKV({})) | TurboQuant(3)"),
    *(
        form.format(one)
        for one in EVICTORS
        for form in FORMS
        if one != WITHOUT_SCORES or not form.startswith("Demote")
    ),
)
BLIND, IN_VIEW = "blind", "in view"
WAYS = {BLIND: False, IN_VIEW: True}
TRIED = 0.3, 0.7
"""Ratios at which bytes are measured; they fall nearly linearly with the ratio."""
CONTINUATION = 128


class Measurement:
    """The cases and pieces of one run, and what is known of each press.

    Args:
        pipe: has the model.
        records: what is known already.
        context: tokens of a case, and of a piece.
        cases, documents: how many.
    """

    def __init__(
        self, pipe: TextGenerationPipeline, records: Records, context: int, cases: int, documents: int
    ) -> None:
        self.pipe, self.records = pipe, records
        depths = [(n + 0.5) / cases for n in range(cases)]
        self.cases = [needle(pipe.tokenizer, context, seed, depth) for seed, depth in enumerate(depths)]
        cut = make_documents if documents else lambda *lengths: []
        pieces = cut(pipe.tokenizer, book_text(), documents, context, CONTINUATION)
        self.pieces = {piece.name: piece for piece in pieces}
        self.probes: dict[str, DivergenceProbe] = {}

    def press_of(self, template: str, share: float) -> str:
        """The press with the ratio at which it leaves a share of the bytes, to three digits."""
        if "{}" not in template:
            return template
        if not self.records.has("ratio", template, str(share)):
            left = [self._share(template.format(ratio)) for ratio in TRIED]
            slope = (left[1] - left[0]) / (TRIED[1] - TRIED[0])
            hides = abs(slope) < 0.01  # all bytes stay: kvpress hides tokens of single heads
            ratio = 1 - share if hides else TRIED[0] + (share - left[0]) / slope
            self.records.add("ratio", template, str(share), ratio=round(min(max(ratio, 0.0), 0.98), 3))
        (line,) = (one for one in self.records.of("ratio", template) if one["case"] == str(share))
        return template.format(line["ratio"])

    def jobs(self, press: str) -> list[Callable[[], None]]:
        """What is still to be measured of a press, deep and shallow cases in turn."""
        asked = [
            partial(self._answer, press, case, way)
            for case in (*self.cases[::2], *self.cases[1::2])
            for way in WAYS
            if not self.records.has("tasks", press, f"{case.name}, {way}")
        ]
        scored = [
            partial(self._diverge, press, name)
            for name in self.pieces
            if press != UNCOMPRESSED and not self.records.has("divergence", press, name)
        ]
        return [*scored, *asked]

    def _ask(self, press: str, case: Case, question_aware: bool) -> TaskResult:
        make = (lambda: None) if press == UNCOMPRESSED else partial(parse_press, press)
        return ask(self.pipe, case, Arm(press, make, "yours"), question_aware)

    def _share(self, press: str) -> float:
        found = self._ask(press, self.cases[0], False)
        return found.resident_bytes / found.uncompressed_bytes

    def _answer(self, press: str, case: Case, way: str) -> None:
        found = self._ask(press, case, WAYS[way])
        self.records.add("tasks", press, f"{case.name}, {way}", way=way, **found.as_dict())

    def _diverge(self, press: str, name: str) -> None:
        if name not in self.probes:
            self.probes[name] = DivergenceProbe(self.pipe.model, [self.pieces[name]])
        (found,) = self.probes[name].over(parse_press(press))
        self.records.add("divergence", press, name, kl=mean(found.kl))


def rows(records: Records, presses: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each press: right answers both ways, KL, and bytes, those with the question in view."""
    found = []
    for press in presses:
        lines = list(records.of("tasks", press))
        right = Counter(line["way"] for line in lines if line["score"] == 1)
        seen = [line for line in lines if line["way"] == IN_VIEW]
        whole, kept = (sum(line[f"{of}_bytes"] for line in seen) for of in ("uncompressed", "resident"))
        ways = {way: right[way] for way in WAYS}
        kl = [line["kl"] for line in records.of("divergence", press)]
        diverged = {"KL": float(f"{mean(kl):.3g}")} if kl else {}
        found.append(
            {"cache": press, "cases": len(seen), **ways, **diverged, "ratio": round(whole / kept, 2)}
        )
    return found


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--press", action="append", help="a press, as on the command line; may be repeated")
    parser.add_argument("--share", type=float, default=None, help="of the bytes of an uncompressed cache")
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=1200)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--documents", type=int, default=0, help="pieces of the book for the divergence")
    parser.add_argument("--output", type=Path, default=Path("quantpress-question-in-view"))
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    templates = args.press or (PRESSES if args.share is None else GRID)
    if args.share is None and any("{}" in one for one in templates):
        parser.error("a press with {} in it needs --share, the share of the bytes that it may keep")
    pipe = load_pipeline(args.model, args.device, args.dtype)
    settings = {"model": model_name(pipe), "context": args.context, "dtype": args.dtype}
    settings["in_view"] = "question_aware=True"
    records = Records(args.output / "results.jsonl", settings)
    run = Measurement(pipe, records, args.context, args.cases, args.documents)
    presses = [UNCOMPRESSED]
    with Console(stderr=True).status("measuring bytes") as status:
        for template in templates:
            status.update(f"the ratio of {template}")
            presses.append(run.press_of(template, args.share))
    in_turn = zip_longest(*(run.jobs(press) for press in presses))
    jobs = [job for some in in_turn for job in some if job is not None]
    for job in track(jobs, console=Console(stderr=True)):
        job()
    report = {
        "date": date.today().isoformat(),
        "machine": machine(pipe),
        "source": "benchmarks/question_in_view.py",
        **settings,
        "rows": rows(records, presses),
    }
    columns = list(max(report["rows"], key=len))
    print(table(columns, [[str(row.get(name, "")) for name in columns] for row in report["rows"]]))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
