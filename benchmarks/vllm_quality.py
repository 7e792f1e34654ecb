"""What our KV-cache dtypes cost in quality inside vLLM, against vLLM's own cache and against transformers.

    python benchmarks/vllm_quality.py                        float32 and bfloat16, as in docs/results
    python benchmarks/vllm_quality.py --dtype float32 --documents 2 --bits 4
    python benchmarks/vllm_quality.py --json rows.json

Run it in an environment with vLLM; a CPU is enough. The texts are those of `quantpress eval --suite quick`:
pieces of the shipped book, a prompt of 1024 tokens and 128 scored tokens. Every engine is given the tokens of
the text one at a time, as if it had chosen them. Its logits after each are compared with those of vLLM over
its own cache: KL(own || ours) in nats. In the same way `TurboQuant` in transformers is compared with
`DynamicCache`. The head of the model is in float32 everywhere.

    profile      statistics of keys from `quantpress calibrate`, of the project's own documentation
    first chunk  statistics of keys from the engine's first prompt, a piece of the book that is not scored
    prefix hit   the same prompts again: first blocks are in the prefix cache, recent pages are gone

`ratio` is KL over that of `TurboQuant(bits)`, which has as many bits, and 4 sinks and at least 128 recent
tokens in 16 bits, as the engine has, but statistics of each prompt. `to preset` is KL over that of the
preset, which keeps 8 more sinks that it detects, and at least 64 recent tokens.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))  # a Python with PYTHONSAFEPATH does not look beside a script

from forced_decoding import REQUESTS, Job

from quantpress.cache import host
from quantpress.evaluation.divergence.documents import Pieces, make_documents, make_unread_documents
from quantpress.evaluation.divergence.teacher_forcing import kl_divergence, score_continuation
from quantpress.evaluation.results.statistics import Estimate, mean_by_document, paired_ratio
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.pipelines.calibration import calibrate
from quantpress.pipelines.default_model import ensure_default_model
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import TurboQuant
from quantpress.presses.base_press import BasePress

BITS = (4, 3, 2)
DOCUMENTS, CONTEXT, CONTINUATION = 6, 1024, 129
"""Those of the suite `quick`, which needs kvpress."""

LEAST_CONTEXT = 1024
"""Tokens of a prompt from which an engine takes statistics, without a profile."""

Arms = dict[str, list[list[float]]]
"""KL of each scored token of each document, by arm."""


def presses(bits: int) -> dict[str, BasePress]:
    """What is compared in transformers: the windows of the engine, and the preset."""
    preset = TurboQuant.preset("balanced") if bits == 4 else TurboQuant.preset("small", bits=bits)
    return {
        f"transformers, TurboQuant({bits})": TurboQuant(bits),
        f"transformers, preset, {bits} bits": preset,
    }


@torch.inference_mode()
def scored(model: Any, ids: torch.Tensor, context: int, press: BasePress | None) -> torch.Tensor:
    """Log-probabilities [n, N - 1, V] of texts, read at once and then decoded a token at a time."""
    cache = host.empty_cache(model)
    position = read_context(model, ids[:, :context], cache, press, progress=False)
    return torch.cat(list(score_continuation(model, cache, ids[:, context:], position, 1)), dim=1)


def in_transformers(model: Any, texts: torch.Tensor, context: int, widths: Sequence[int]) -> Arms:
    """KL of each press against DynamicCache."""
    own = scored(model, texts, context, None)
    named = {name: press for bits in widths for name, press in presses(bits).items()}
    return {name: divergences(own, scored(model, texts, context, press)) for name, press in named.items()}


def in_vllm(folder: Path, job: dict[str, Any], widths: Sequence[int], profile: Path) -> Iterator[Arms]:
    """KL of each engine against vLLM's own cache, arm by arm."""
    own = forced(folder, Job(**job, cache_dtype="auto", profile=None, outputs=[str(folder / "own")]))[0]
    for bits in widths:
        for name, file in (("profile", str(profile)), ("first chunk", None)):
            outputs = [str(folder / "first"), str(folder / "again")]
            found = forced(
                folder, Job(**job, cache_dtype=f"quantpress_{bits}bit", profile=file, outputs=outputs)
            )
            for round_name, logits in zip(("", ", prefix hit"), found, strict=True):
                yield {f"vLLM, quantpress_{bits}bit, {name}{round_name}": divergences(own, logits)}


def divergences(own: torch.Tensor, other: torch.Tensor) -> list[list[float]]:
    """KL in nats of logits or log-probabilities [n, N - 1, V], for each text and token."""
    pairs = zip(own, other, strict=True)
    return [kl_divergence(a.log_softmax(-1), b.log_softmax(-1)).tolist() for a, b in pairs]


def forced(folder: Path, job: Job) -> list[torch.Tensor]:
    """Run an engine in its own process; its logits."""
    file = folder / "job.json"
    file.write_text(json.dumps(asdict(job)))
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "quantpress",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
    }
    script = Path(__file__).parent / "forced_decoding.py"
    subprocess.run([sys.executable, str(script), str(file)], env=settings, check=True, stdout=sys.stderr)
    return [torch.load(output, mmap=False) for output in job.outputs]


def summary(arms: Arms, dtype: str) -> list[dict[str, Any]]:
    """A row for each arm: mean KL, and its ratios to the two arms in transformers of the same width."""
    means = {arm: [sum(one) / len(one) for one in documents] for arm, documents in arms.items()}
    rows = []
    for arm, documents in arms.items():
        bits = next(bits for bits in BITS if arm in presses(bits) or f"_{bits}bit" in arm)
        ratios = [paired_ratio(means[other], means[arm]) for other in presses(bits)]
        row = {"arm": arm, "dtype": dtype, "bits": bits, "kl": mean_by_document(documents)}
        rows.append({**row, "ratio": ratios[0], "to_preset": ratios[1], "by_document": means[arm]})
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    cells = [
        (row["arm"], row["dtype"], f"{row['kl']:.5f}", f"{row['ratio']:.2f}", f"{row['to_preset']:.2f}")
        for row in rows
    ]
    lines = [("arm", "dtype", "KL, nats", "ratio", "to preset"), ("---",) * 5, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value: Any) -> Any:
    """For JSON: six digits."""
    if isinstance(value, Estimate):
        return {name: plain(number) for name, number in asdict(value).items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def record(head: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A file of results, a line for each row."""
    lines = ",\n".join("  " + json.dumps({name: plain(value) for name, value in row.items()}) for row in rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What stands beside the figures."""
    names = ("vllm", "torch", "transformers")
    return {
        "command": " ".join(["python benchmarks/vllm_quality.py", *arguments.words]),
        "date": f"{date.today()}",
        "machine": f"{torch.get_num_threads()} threads of a CPU, {platform.machine()}",
        "versions": {name: version(name) for name in names},
        "model": ensure_default_model().name,
        "documents": arguments.documents,
        "context": arguments.context,
        "scored_tokens": CONTINUATION - 1,
        "profile_text": "docs/*.md, the defaults of calibrate",
    }


def texts(tokenizer: Any, arguments: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Token ids of the scored pieces of the book, and of others."""
    sizes = arguments.context, CONTINUATION
    documents = make_documents(tokenizer, book_text(), arguments.documents, *sizes)
    read = Pieces(arguments.documents, *sizes)
    others = make_unread_documents(tokenizer, book_text(), Pieces(REQUESTS + 2, *sizes), [read])
    pieces = {"scored": documents, "others": others}
    return {name: torch.stack([one.ids for one in some]) for name, some in pieces.items()}


def documentation() -> str:
    """A text that is not scored and no novel: the pages of docs/."""
    pages = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)


def measure(dtype: str, folder: Path, arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """All arms in one dtype; the rows so far, after each."""
    home = ensure_default_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    model = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=getattr(torch, dtype)).eval()
    ids, profile = texts(tokenizer, arguments), folder / "profile.safetensors"
    torch.save(ids, folder / "texts")
    calibrate(model, tokenizer, {"documentation": documentation()}, progress=False).save(profile)
    arms = in_transformers(model, ids["scored"], arguments.context, arguments.bits)
    yield summary(arms, dtype)
    del model
    job = {"model": str(home), "dtype": dtype, "texts": str(folder / "texts"), "context": arguments.context}
    for found in in_vllm(folder, job, arguments.bits, profile):
        arms.update(found)
        yield summary(arms, dtype)


def main(words: Sequence[str]) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"), help="default: both")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=BITS)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    arguments = parser.parse_args(words)
    arguments.words = words
    if arguments.context < LEAST_CONTEXT or not 1 <= arguments.documents <= REQUESTS:
        parser.error(f"--context is at least {LEAST_CONTEXT}, and --documents are 1 to {REQUESTS}")
    done: list[dict[str, Any]] = []
    for dtype in arguments.dtype or ("float32", "bfloat16"):
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            for rows in measure(dtype, Path(folder), arguments):
                print(shown(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                if arguments.json:
                    arguments.json.write_text(record(about(arguments), [*done, *rows]))
        done += rows
    print(shown(done))


if __name__ == "__main__":
    main(sys.argv[1:])
