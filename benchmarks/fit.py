"""What widths by layer save: estimates from one pass against one forward a layer, and the plans of both.

    python benchmarks/fit.py --json fit.json                                the default model, 1024 tokens
    python benchmarks/fit.py --model FOLDER --device cuda --dtype bfloat16 --context 4096 --pieces 8 \
        --documents 8 --reference-widths 1 2 3 4 --json fit.json

1. The estimate, which `quantpress fit` ships: gradients of one pass along the errors of the codes, at every
   width (`evaluation/fitting/sensitivity.py`), on pieces of the first half of the shipped book.
2. The reference, on --reference-pieces of the same half: KL of the model with the keys, or values, of one
   layer at `--reference-widths` bits and all else at 8; widths that were not measured follow from the
   distortion of the codebooks. Spearman's rank correlation of the estimate to it, by width.
3. Plans of both within the bytes of one width: 2/2 (mean 2), 3/2 (mean 2.5) and 3/3 (mean 3). KL to the
   uncompressed model in nats, on pieces of the second half of the book, with the windows of the presets.
   `ratio` is the KL over that of one width, with a 95 % bootstrap interval over documents.

A run that was interrupted goes on from the files in --work.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr

from quantpress.cache.saved.width_plan import Errors, WidthPlan
from quantpress.cli.loading import load_pipeline, model_name
from quantpress.evaluation.divergence.documents import Document, Pieces, make_documents
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.fitting.fit import DEFAULT_WIDTHS, Measured, among, measure
from quantpress.evaluation.measuring import machine
from quantpress.evaluation.results.markdown import table
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.results.statistics import mean_by_document, paired_ratio
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.presses import TurboQuant
from quantpress.quantization.budget import WHOLE_BITS

BUDGETS = {2.0: (2, 2), 2.5: (3, 2), 3.0: (3, 3)}
"""Mean width, and the widths of keys and values whose bytes it stands for."""

DISTORTION = {1: 0.360889, 2: 0.116000, 3: 0.033966, 4: 0.009315, 8: 0.00004}
"""Mean squared error of the codebooks at head_dim 128 (at 8 bits about): how errors grow."""

CONTINUATION = 129
SIDES = ("keys", "values")

Plans = dict[str, dict[float, WidthPlan]]
"""Plans by the name of what they come from, and by mean width."""


@dataclass(frozen=True)
class Scorer:
    """Mean KL of documents under a press, each read once uncompressed.

    Args:
        probes: one for each document.
    """

    probes: Sequence[DivergenceProbe]

    @classmethod
    def of(cls, model: Any, documents: Iterable[Document]) -> "Scorer":
        """Read the documents."""
        return cls([DivergenceProbe(model, [document]) for document in documents])

    def kl(self, press: TurboQuant) -> list[list[float]]:
        """KL of each token of each document."""
        return [list(probe.over(press)[0].kl) for probe in self.probes]


def reference(
    scorer: Scorer, press: TurboQuant, layers: Sequence[int], widths: Sequence[int], records: Records
) -> dict[int, tuple[dict[int, float], dict[int, float]]]:
    """KL with the keys, or values, of one layer at a width and all else at 8 bits, less that of 8 bits."""
    jobs = [(index, side, bits) for bits in widths for index in layers for side in range(2)]
    for job in track([None, *jobs], console=Console(stderr=True), description="reference"):
        name = "8 bits" if job is None else f"layer {job[0]} {SIDES[job[1]]} {job[2]}"
        if not records.has("kl", "", name):
            pair = None if job is None else {job[0]: (job[2], 8) if job[1] == 0 else (8, job[2])}
            kl = scorer.kl(replace(press, bits=8, layer_bits=pair))
            records.add("kl", "", name, value=float(np.mean(kl)))
    value = {line["case"]: line["value"] for line in records.of("kl")}
    found: dict[int, tuple[dict[int, float], dict[int, float]]] = {index: ({}, {}) for index in layers}
    for index, side, bits in jobs:
        found[index][side][bits] = value[f"layer {index} {SIDES[side]} {bits}"] - value["8 bits"]
    return found


def extended(errors: Errors) -> Errors:
    """Errors at every width; those that were not measured follow from the nearest, by distortion."""

    def whole(side: dict[int, float]) -> dict[int, float]:
        near = {bits: min(side, key=lambda one, bits=bits: abs(one - bits)) for bits in WHOLE_BITS}  # type: ignore[misc]
        return {bits: max(side[one], 0.0) * DISTORTION[bits] / DISTORTION[one] for bits, one in near.items()}

    return {index: (whole(dict(keys)), whole(dict(values))) for index, (keys, values) in errors.items()}


def correlations(estimate: Errors, exact: Errors, widths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Spearman's rank correlation over all layers and sides, and by side, for each measured width."""
    found: dict[str, dict[str, float]] = {}
    for bits in widths:
        pairs = {
            side: [(estimate[i][n][bits], exact[i][n][bits]) for i in sorted(exact)]
            for n, side in enumerate(SIDES)
        }
        groups = {"all": [*pairs["keys"], *pairs["values"]], **pairs}
        found[str(bits)] = {
            name: float(spearmanr(*zip(*some, strict=True)).statistic) for name, some in groups.items()
        }
    return found


def plans(measured: Measured, exact: Errors | None, context: int) -> Plans:
    """Plans within the bytes of each mean width, by the name of what they come from."""
    budget = measured.budget(context)
    sources = {
        "one pass, 1 to 8 bits": measured.errors,
        "one pass, 2 to 4 bits": among(measured.errors, DEFAULT_WIDTHS),
    }
    if exact is not None:
        whole = extended(exact)
        sources |= {
            "layer by layer, 1 to 8 bits": whole,
            "layer by layer, 2 to 4 bits": among(whole, DEFAULT_WIDTHS),
        }
    found: Plans = {}
    for name, errors in sources.items():
        for mean, pair in BUDGETS.items():
            widths = budget.widths(errors, budget.uniform(*pair))
            plan = WidthPlan(measured.model, measured.fingerprint, widths, bits=budget.bits(widths))
            found.setdefault(name, {})[mean] = plan
    return found


def scores(
    scored: Scorer, measured: Measured, made: Plans, context: int, records: Records
) -> list[dict[str, Any]]:
    """KL of one width and of the plans within its bytes, a line each."""
    budget, press, rows = measured.budget(context), TurboQuant.preset("small"), []

    def kl_of(name: str, made: TurboQuant) -> list[list[float]]:
        if not records.has("kl", name, ""):
            records.add("kl", name, "", kl=scored.kl(made))
        found: list[list[float]] = next(line["kl"] for line in records.of("kl", name))
        return found

    for mean, (keys, values) in track(BUDGETS.items(), console=Console(stderr=True), description="plans"):
        uniform = replace(press, bits=None, key_bits=keys, value_bits=values)
        same = [[layer.index, [keys, values]] for layer in budget.layers]
        base = kl_of(json.dumps(same), uniform)
        found = {f"one width, {keys}/{values}": (base, 8 * budget.uniform(keys, values) / budget.numbers)}
        for source, by_mean in made.items():
            plan = by_mean[mean]
            name = json.dumps(sorted(plan.widths.items()))
            found[source] = kl_of(name, replace(press, bits=None, plan=plan)), plan.bits
        means = {source: [float(np.mean(one)) for one in kl] for source, (kl, _) in found.items()}
        first = next(iter(means.values()))
        rows += [
            {
                "mean": mean,
                "widths": source,
                "bits_per_value": round(bits, 4),
                "kl": vars(mean_by_document(kl)),
                "ratio": vars(paired_ratio(first, means[source])),
            }
            for source, (kl, bits) in found.items()
        ]
    return rows


def main() -> None:
    """Measure, print tables, and write JSON."""
    args = arguments()
    pipe = load_pipeline(args.model, args.device, args.dtype)
    model, name = pipe.model, Path(model_name(pipe)).name
    folder = args.work or Path(f"quantpress-fit-{name}-{args.context}")
    folder.mkdir(parents=True, exist_ok=True)
    text, press = book_text(), TurboQuant.preset("small")
    texts = {"first half": text[: len(text) // 2], "second half": text[len(text) // 2 :]}
    shape = (args.context, CONTINUATION)
    begin = time.perf_counter()
    measured = measure(
        *(model, pipe.tokenizer, {"first half": texts["first half"]}, press),
        pieces=Pieces(args.pieces, *shape),
        name=name,
        partial=folder / "estimate.jsonl",
    )
    seconds = {"estimate": round(time.perf_counter() - begin, 1)}
    exact = None
    if args.reference_widths:
        begin = time.perf_counter()
        read = make_documents(pipe.tokenizer, texts["first half"], args.reference_pieces, *shape)
        named = {one: getattr(args, one) for one in ("context", "reference_pieces")}
        settings = {"model": name, "dtype": str(model.dtype), **named}
        records = Records(folder / "reference.jsonl", settings)
        layers = sorted(measured.errors)
        exact = reference(Scorer.of(model, read), press, layers, args.reference_widths, records)
        seconds["reference"] = round(time.perf_counter() - begin, 1)
    made = plans(measured, exact, args.context)
    documents = make_documents(pipe.tokenizer, texts["second half"], args.documents, *shape)
    settings = {
        "model": name,
        "dtype": str(model.dtype),
        "context": args.context,
        "documents": args.documents,
    }
    records = Records(folder / "scores.jsonl", settings)
    report = {
        "date": date.today().isoformat(),
        "machine": machine(pipe),
        "source": "benchmarks/fit.py",
        "model": name,
        **{one: getattr(args, one) for one in ("context", "pieces", "reference_pieces", "documents")},
        "seconds": seconds,
        "correlation": {} if exact is None else correlations(measured.errors, exact, args.reference_widths),
        "rows": scores(Scorer.of(model, documents), measured, made, args.context, records),
        "plans": {
            source: {mean: {i: list(pair) for i, pair in plan.widths.items()} for mean, plan in one.items()}
            for source, one in made.items()
        },
        "estimate": plain(measured.errors),
        "reference": None if exact is None else plain(exact),
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def plain(errors: Errors) -> dict[str, Any]:
    """Errors for JSON."""
    return {
        str(index): {
            side: {str(bits): float(f"{error:.4g}") for bits, error in one.items()}
            for side, one in zip(SIDES, pair, strict=True)
        }
        for index, pair in errors.items()
    }


def show(report: dict[str, Any]) -> None:
    """Print the tables in Markdown."""
    where = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    print(f"{report['model']}, {report['context']} tokens; {where}; seconds {report['seconds']}\n")
    if report["correlation"]:
        lines = [
            (bits, *(f"{one[name]:.3f}" for name in ("all", *SIDES)))
            for bits, one in report["correlation"].items()
        ]
        print(table(("bits", "rank correlation", *SIDES), lines), "\n")
    lines = []
    for one in report["rows"]:
        kl, ratio = one["kl"], one["ratio"]
        shown = f"{ratio['value']:.2f}"
        if ratio["low"] is not None:
            shown += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        bits = f"{one['bits_per_value']:.3f}"
        lines.append((f"{one['mean']}", one["widths"], bits, f"{kl['value']:.5f}", shown))
    print(table(("mean", "widths", "bits a value", "KL, nats", "ratio"), lines))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="folder or id; left out, the default model")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--pieces", type=int, default=4, help="pieces that are measured")
    parser.add_argument("--reference-pieces", type=int, default=2, help="pieces of the reference")
    parser.add_argument("--documents", type=int, default=6, help="pieces that plans are scored on")
    parser.add_argument("--reference-widths", type=int, nargs="*", default=[2], help="none: no reference")
    parser.add_argument("--work", type=Path, default=None, help="folder of partial results")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
