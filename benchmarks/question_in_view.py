"""Answers over compressed caches, with the question read after the press has chosen tokens, and before.

    python benchmarks/question_in_view.py --json view.json                       the default model
    python benchmarks/question_in_view.py --press "SnapKV(0.25) | TurboQuant(4)"

A five-digit number is planted in a book, at as many depths as there are cases, and asked for. `blind`: the
question follows a context that was compressed without it, as in `pipe(context, question=question)`. `in
view`: the press sees the question, as in `pipe(context, question=question, question_aware=True)`. The prompts
are the same. A case is right when the answer contains the number. Results are kept in --output, and a run
that was interrupted goes on from there.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from quantpress.cli.loading import load_pipeline, model_name
from quantpress.evaluation.arms import UNCOMPRESSED, Arm
from quantpress.evaluation.measuring import machine
from quantpress.evaluation.results.markdown import table
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.tasks.needle_tasks import needle
from quantpress.evaluation.tasks.task_runs import ask
from quantpress.presses.expression import parse_press

EVICTORS = (
    *("SnapKV(0.5)", "ChunkKV(SnapKV(0.5))", "ExpectedAttention(0.5)", "Compactor(0.5)", "KeyDiff(0.5)"),
    *("StreamingLLM(0.5)", "KVzip(0.5)", "Demote(SnapKV(0.5), bits=2)"),
)
PRESSES = (
    *("TurboQuant(4)", "TurboQuant(2)", *(f"{one} | TurboQuant(4)" for one in EVICTORS)),
    *("ChunkKV(SnapKV(0.5)) | TurboQuant(3)", "ChunkKV(SnapKV(0.7)) | TurboQuant(4)"),
)
BLIND, IN_VIEW = "blind", "in view"
WAYS = {BLIND: False, IN_VIEW: True}


def rows(records: Records, presses: Sequence[str]) -> list[dict[str, Any]]:
    """A line for each press: right answers both ways, and bytes, those with the question in view."""
    found = []
    for press in presses:
        lines = list(records.of("tasks", press))
        right = Counter(line["way"] for line in lines if line["score"] == 1)
        seen = [line for line in lines if line["way"] == IN_VIEW]
        whole, kept = (sum(line[f"{of}_bytes"] for line in seen) for of in ("uncompressed", "resident"))
        ways = {way: right[way] for way in WAYS}
        found.append({"cache": press, "cases": len(lines) // 2, **ways, "ratio": round(whole / kept, 2)})
    return found


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--press", action="append", help="a press, as on the command line; may be repeated")
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=1200)
    parser.add_argument("--cases", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("quantpress-question-in-view"))
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    pipe = load_pipeline(args.model, args.device, args.dtype)
    presses = [UNCOMPRESSED, *(args.press or PRESSES)]
    depths = [(n + 0.5) / args.cases for n in range(args.cases)]
    cases = [needle(pipe.tokenizer, args.context, seed, depth) for seed, depth in enumerate(depths)]
    settings = {"model": model_name(pipe), "context": args.context, "dtype": args.dtype}
    settings["in_view"] = "question_aware=True"
    records = Records(args.output / "results.jsonl", settings)
    for case in track(cases, console=Console(stderr=True)):
        for press in presses:
            make = (lambda: None) if press == UNCOMPRESSED else partial(parse_press, press)
            for way, question_aware in WAYS.items():
                if not records.has("tasks", press, f"{case.name}, {way}"):
                    found = ask(pipe, case, Arm(press, make, "yours"), question_aware).as_dict()
                    records.add("tasks", press, f"{case.name}, {way}", way=way, **found)
    report = {
        "date": date.today().isoformat(),
        "machine": machine(pipe),
        "source": "benchmarks/question_in_view.py",
        **settings,
        "rows": rows(records, presses),
    }
    lines = [[str(value) for value in row.values()] for row in report["rows"]]
    print(table(list(report["rows"][0]), lines))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
