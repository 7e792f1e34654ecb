"""What each setting of `TurboQuant` costs in quality and in bytes, on pages of the book that no suite scores.

    python benchmarks/defaults.py                                every setting below, contexts of 1024 tokens
    python benchmarks/defaults.py --context 4096 --documents 4
    python benchmarks/defaults.py --press "TurboQuant(3)" --press "TurboQuant(3, scale='unbiased')"

The first press is what the others are compared with: `ratio` is their KL over its, with a 95 % bootstrap
interval over documents, which are the same for all. The model runs in float32, so that rounding adds nothing;
bits a value are those of the same cache in a model of 16 bits. Results are kept in --output, and a run that
was interrupted goes on from there.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from quantpress.cli.loading import load_pipeline, model_name
from quantpress.evaluation.divergence.documents import Pieces, make_unread_documents
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.evaluation.results.markdown import table
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.results.statistics import mean_by_document, paired_ratio
from quantpress.evaluation.sizing.memory_plan import Planner
from quantpress.evaluation.sizing.model_outline import outline
from quantpress.evaluation.suites import SUITES
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.presses.expression import parse_press

BASE = "TurboQuant.preset('small')"
CHANGES = {
    "windows": [f"recent_tokens={n}" for n in (0, 16, 32, 128)],
    "sinks": ["sink_tokens=0", "sink_tokens=8", *(f"detect_sinks={n}" for n in (0, 4, 16))],
    "widths": [
        "key_bits=8, value_bits=4",
        "bits=4",
        "key_bits=4",
        "bits=3.5",
        "key_bits=4, value_bits=2",
        "bits=2",
    ],
    "codec": [
        *("scale='norm'", "scale='norm_corrected'", "scale='unbiased'", "codebook='lloyd_max'"),
        *("rotation='haar'", "seed=1", "mean_key=False", "balance=False"),
        *("balance_window=64", "balance_window=1024"),
    ],
}
OTHERS = [
    "TurboQuant.preset('paper', bits=3, sink_tokens=12, recent_tokens=64)",
    "TurboQuant.preset('paper', bits=3.5, sink_tokens=12, recent_tokens=64)",
]


def every_setting() -> list[str]:
    """The base, the base with each change, and TurboQuant as published with as many tokens in 16 bits."""
    changed = [f"{BASE[:-1]}, {change})" for changes in CHANGES.values() for change in changes]
    return [BASE, *changed, *OTHERS]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--press", action="append", help="a press, as on the command line; may be repeated")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--continuation", type=int, default=129)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    presses = args.press or every_setting()
    pipe = load_pipeline(args.model, args.device, "float32")
    wanted = Pieces(args.documents, args.context, args.continuation)
    scored = [Pieces(one.documents, one.context, one.continuation) for one in SUITES.values()]
    documents = make_unread_documents(pipe.tokenizer, book_text(), wanted, scored)
    folder = args.output or Path(f"quantpress-defaults-{args.context}")
    settings = {"model": model_name(pipe), "documents": args.documents, "context": args.context}
    records = Records(folder / "results.jsonl", settings)
    for document in track(documents, console=Console(stderr=True)):
        probe = DivergenceProbe(pipe.model, [document])
        for press in presses:
            if not records.has("fidelity", press, document.name):
                (found,) = probe.over(parse_press(press))
                records.add("fidelity", press, document.name, **found.as_dict())
    print(report(presses, records, args.context, args.model))


def report(presses: list[str], records: Records, context: int, model: str | None) -> str:
    """A table in Markdown, the first press in front."""
    sizes = replace(outline(model), dtype=torch.bfloat16)
    kl = {press: [line["kl"] for line in records.of("fidelity", press)] for press in presses}
    means = {press: [float(np.mean(one)) for one in documents] for press, documents in kl.items()}
    rows = []
    for press in presses:
        plan = Planner(sizes, parse_press(press)).plan(context)
        bits = 16 * plan.cache.total_bytes / plan.whole_bytes
        ratio = paired_ratio(means[presses[0]], means[press])
        rows.append((press, f"{bits:.2f}", f"{mean_by_document(kl[press]):.5f}", f"{ratio:.2f}"))
    return table(("press", "bits a value", "KL, nats", "ratio"), rows)


if __name__ == "__main__":
    main()
