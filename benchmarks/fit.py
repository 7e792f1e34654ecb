"""What widths by layer or by head save: estimates from one pass, measurements layer by layer, plans of both.

    python benchmarks/fit.py --json fit.json                                the default model, 1024 tokens
    python benchmarks/fit.py --model FOLDER --device cuda --dtype bfloat16 --context 4096 --pieces 8 \
        --documents 8 --json fit.json

1. One pass: errors that are estimated from gradients, at every width (`evaluation/fitting/one_pass.py`), on
   pieces of the first half of the shipped book.
2. Layer by layer, on --reference-pieces of the same half: KL of the model with the keys, or values, of one
   layer at each of --reference-widths and all else at 8 bits (`evaluation/fitting/layer_by_layer.py`), and
   Spearman's rank correlation of the estimate to it, by width.
3. Plans of both within the bytes of one width: 2/2 (mean 2), 3/2 (mean 2.5) and 3/3 (mean 3). KL to the
   uncompressed model in nats, on pieces of the second half of the book, with the windows of the presets.
   `ratio` is the KL over that of one width, with a 95 % bootstrap interval over documents. Plans use only
   widths that were measured.
4. With --trellis, the same with trellis codes in place of scalar ones, in the same bytes: one width, and
   plans of errors that were measured layer by layer with trellis codes. On a CPU this takes hours.
5. With --by head, errors of each KV head are measured. Beside plans by layer, made of their sums, there are
   plans in the same bytes in which each head has its own widths. `over_layers`: their KL over that by layer.

A run that was interrupted goes on from the files in --work.
"""

import argparse
import itertools
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

from quantpress.cache.saved.width_plan import SIDES, Error, Errors, Width, WidthPlan, heads_of
from quantpress.cli.loading import load_pipeline, model_name
from quantpress.evaluation.divergence.documents import Document, Pieces, make_documents
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.fitting.fit import LAYER_BY_LAYER, ONE_PASS, measure
from quantpress.evaluation.fitting.measured import DEFAULT_WIDTHS, HEAD, LAYER, By, Measured, among
from quantpress.evaluation.fitting.pieces import CONTINUATION
from quantpress.evaluation.measuring import machine
from quantpress.evaluation.results.markdown import table
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.results.statistics import mean_by_document, paired_ratio
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.presses import TurboQuant

BUDGETS = {2.0: (2, 2), 2.5: (3, 2), 3.0: (3, 3)}
"""Mean width, and the widths of keys and values whose bytes it stands for."""

TRELLIS = "trellis, "
"""What the name of a line begins with where the codes are trellis codes."""

BY_HEAD = " by head"
"""What stands in the name of a line where heads have widths of their own."""

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


def plans(
    measured: Measured, exact: Measured | None, trellis: Measured | None, context: int, by: By
) -> Plans:
    """Plans within the bytes of each mean width, by the name of what they come from."""
    budget, found = measured.budget(context), Plans()
    sources = ("one pass", measured), ("layer by layer", exact), (f"{TRELLIS}layer by layer", trellis)
    for (source, of), unit in itertools.product(sources, (LAYER,) if by == LAYER else (LAYER, HEAD)):
        if of is None:
            continue
        errors = of.errors_by(unit)
        known = sorted({bits for pair in errors.values() for bits in pair[0]})
        for widths in (tuple(known), DEFAULT_WIDTHS):
            if not {*widths} <= {*known}:
                continue
            kind = source if unit == LAYER else f"{source}{BY_HEAD}"
            name, some = f"{kind}, {widths[0]} to {widths[-1]} bits", among(errors, widths)
            for mean, pair in BUDGETS.items():
                chosen = budget.widths(some, budget.uniform(*pair))
                plan = WidthPlan(of.model, of.fingerprint, chosen, bits=budget.bits(chosen))
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
        bits = 8 * budget.uniform(keys, values) / budget.numbers
        found = {f"one width, {keys}/{values}": (base, bits)}
        if any(source.startswith(TRELLIS) for source in made):
            kl = kl_of(TRELLIS + json.dumps(same), replace(uniform, codebook="trellis"))
            found[f"{TRELLIS}one width, {keys}/{values}"] = kl, bits
        for source, by_mean in made.items():
            plan, kind = by_mean[mean], TRELLIS if source.startswith(TRELLIS) else ""
            code = replace(press, codebook="trellis") if kind else press
            name = kind + json.dumps(sorted(plan.widths.items()))
            found[source] = kl_of(name, replace(code, bits=None, plan=plan)), plan.bits
        means = {source: [float(np.mean(one)) for one in kl] for source, (kl, _) in found.items()}
        first = next(iter(means.values()))
        rows += [
            {
                "mean": mean,
                "widths": source,
                "bits_per_value": round(bits, 4),
                "kl": vars(mean_by_document(kl)),
                "ratio": vars(paired_ratio(first, means[source])),
                **(
                    {"over_layers": vars(paired_ratio(means[source.replace(BY_HEAD, "")], means[source]))}
                    if BY_HEAD in source
                    else {}
                ),
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
    given = model, pipe.tokenizer, {"first half": texts["first half"]}, press
    partial = {one: folder / f"{one}.jsonl" for one in ("estimate", "reference", "trellis")}
    pieces = Pieces(args.pieces, *shape)
    options = {"name": name, "by": args.by}
    measured = measure(*given, pieces, method=ONE_PASS, **options, partial=partial["estimate"])
    seconds = {"estimate": round(time.perf_counter() - begin, 1)}
    exact = trellis = None
    pieces, widths = Pieces(args.reference_pieces, *shape), args.reference_widths
    options |= {"method": LAYER_BY_LAYER, "widths": widths}
    if widths:
        begin = time.perf_counter()
        exact = measure(*given, pieces, **options, partial=partial["reference"])
        seconds["reference"] = round(time.perf_counter() - begin, 1)
    if widths and args.trellis:
        begin = time.perf_counter()
        given = *given[:3], replace(press, codebook="trellis")
        trellis = measure(*given, pieces, **options, partial=partial["trellis"])
        seconds["trellis"] = round(time.perf_counter() - begin, 1)
    made = plans(measured, exact, trellis, args.context, args.by)
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
        **{one: getattr(args, one) for one in ("context", "pieces", "reference_pieces", "documents", "by")},
        "seconds": seconds,
        "correlation": {}
        if exact is None
        else correlations(measured.errors_by(LAYER), exact.errors_by(LAYER), args.reference_widths),
        "rows": scores(Scorer.of(model, documents), measured, made, args.context, records),
        "plans": {
            source: {
                mean: " ".join("/".join(map(shown, pair)) for _, pair in sorted(plan.widths.items()))
                for mean, plan in one.items()
            }
            for source, one in made.items()
        },
        "estimate": plain(measured.errors),
        "reference": None if exact is None else plain(exact.errors),
        "trellis": None if trellis is None else plain(trellis.errors),
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def plain(errors: Errors) -> dict[str, Any]:
    """Errors for JSON."""
    return {
        str(index): {
            side: {str(bits): _rounded(error) for bits, error in one.items()}
            for side, one in zip(SIDES, pair, strict=True)
        }
        for index, pair in errors.items()
    }


def _rounded(error: Error) -> float | list[float]:
    heads = [float(f"{one:.4g}") for one in heads_of(error)]
    return heads if isinstance(error, tuple) else heads[0]


def shown(bits: Width) -> str:
    """A width, or those of heads."""
    return ",".join(map(str, heads_of(bits)))


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
        interval = f"{ratio['value']:.2f}"
        if ratio["low"] is not None:
            interval += f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        bits = f"{one['bits_per_value']:.3f}"
        lines.append((f"{one['mean']}", one["widths"], bits, f"{kl['value']:.5f}", interval))
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
    parser.add_argument(
        "--reference-widths", type=int, nargs="*", default=[1, 2, 3, 4], help="none: no reference"
    )
    parser.add_argument("--by", choices=(LAYER, HEAD), default=LAYER, help="what has widths of its own")
    parser.add_argument("--trellis", action="store_true", help="measure and score trellis codes, too")
    parser.add_argument("--work", type=Path, default=None, help="folder of partial results")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.trellis and not args.reference_widths:
        parser.error("--trellis measures layer by layer: leave --reference-widths out, or name widths")
    return args


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
