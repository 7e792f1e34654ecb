"""Writes the tables of measurements in the pages, and docs/divergence.png, from the files of docs/results/.

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; `TABLES` says what each name
writes.
"""

import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluation_tables as evaluation
from results import DOCS, Row, formatted, results

from quantpress.pipelines.capture.eligibility import RULES

PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
BUDGETS = {"quarter": 1 / 4, "eighth": 1 / 8, "sixteenth": 1 / 16}

WIDTHS = {width: f"{{{width}}}" for width in ("4/4", "3/3", "2/2", "4/2", "3/2")}
SHAPE = {
    "B": "{batch}",
    "query heads": "{query_heads}",
    "KV heads": "{kv_heads}",
    "head_dim": "{head_dim}",
    "tokens": "{tokens}",
}
PACKING = {
    "bits K/V": "{bits}",
    "keys us": "{key_us}",
    "values us": "{value_us}",
    "of a copy": "{of_copy_percent} % ({terabytes_per_s:.2f} TB/s)",
    "decode us": "{decode_us}",
    "codes at ties, of 2.1 M": "{ties}",
}
PEERS = {
    "alternative": "{name}",
    "K/V bits": "{bits}",
    "131072 tokens": "{at_131072}",
    "32768 tokens": "{at_32768}",
    "timing": "{timing}",
    "bytes": "{bytes}",
    "error": "{error:.3f}",
    "own": "{own:.1e}",
}
GENERATION = {
    "cache": "{cache}",
    "tokens/s": "{tokens_per_s}{faster}",
    "time to first token": "{first_token_s:.2f} s",
    "decode peak over the weights": "{decode_peak_gb:.2f} GB{share}",
    "bytes of the cache": "{cache_gb:.2f} GB",
}
READING = {
    "reading": "{reading}",
    "peak": "{peak_gb} GB",
    "work space": "{work_gb} GB",
    "seconds": "{seconds}",
}
SINKS = {"kept in 16 bits in each head": "{kept}", "2 bits": "{2 bits}", "3 bits": "{3 bits}"}
SETTINGS = {
    "setting": "{setting}",
    "bits a number in a page, head_dim 128": "{page_bits}",
    "in all, 1024 tokens": "{bits_per_value:.2f}",
    "KL, nats": "{kl.value:.4f}",
    "notes": "{note}",
}
FIRST = {
    "cache": "{cache}",
    "KL, nats": "{kl.value:.4f}{note}",
    "same next token": "{percent:.1f} %",
    "bits a value": "{bits_per_value:.2f}",
    "131072 tokens": "{size}",
    "attention there": "{speed}",
}


def attention(short: bool) -> str:
    """Decode attention of every shape; `short`: of the README's, long contexts first."""
    rows, columns = results("attention")["rows"], {**SHAPE, "bf16": "{bf16_us:.1f}", **WIDTHS}
    if not short:
        return formatted(rows, columns)
    columns = {header: columns[header] for header in ("tokens", "bf16", *WIDTHS)}
    columns = {header.replace("4/4", "4/4 bits"): cell for header, cell in columns.items()}
    return formatted(_readme_shape(), columns)


def _readme_shape() -> list[Row]:
    wanted = {"batch": 1, "query_heads": 32, "head_dim": 128}
    return [row for row in reversed(results("attention")["rows"]) if wanted.items() <= row.items()]


def generation() -> str:
    """Tokens a second and memory of generation."""
    plain, *packed = results("generation")["decoding"]
    rows = [{**plain, "faster": "", "share": ""}]
    for row in packed:
        share = row["decode_peak_gb"] / plain["cache_gb"]
        rows.append({**row, "faster": f" ({row['times']}x)", "share": f" ({share:.2f}x the bf16 cache)"})
    return formatted(rows, GENERATION)


def changed_settings(context: int) -> str:
    """One setting of a preset changed at a time."""
    columns = {"setting": "{setting}", f"bits, all of {context} tokens": "{bits_per_value:.2f}"}
    columns |= {"KL, nats": "{kl:.5f}", "ratio": "{ratio:.2f}"}
    return formatted(results("defaults")[f"at_{context}"], columns)


def _arms() -> dict[str, Row]:
    return {row["arm"]: row for row in results("evaluation_quick")["fidelity"]}


def settings() -> str:
    """Settings with their bits and their divergence in the quick suite."""
    arms = _arms()
    return formatted(({**arms[row["arm"]], **row} for row in results("defaults")["settings"]), SETTINGS)


def first() -> str:
    """The README's first table: quality, memory and speed."""
    arms, longest = _arms(), _readme_shape()[0]
    times = {f"{row['name']}, {row['bits']}": row["at_131072"] for row in results("peers")["rows"]} | longest
    rows = []
    for row in results("memory")["rows"]:
        timed, same = times.get(row["timed_as"]), arms[row["arm"]]["agreement"]
        speed = f"{timed.us:.0f} us ({timed.ratio:.2f}x)" if timed else ""
        speed += ", in turbo-attn" if "turbo-attn" in row["timed_as"] else ""
        size = f"{row['gib']:.1f} GiB" if "gib" in row else ""
        own = {"note": "", "percent": 100 * same.value, "size": size, "speed": speed}
        rows.append({**arms[row["arm"]], **row, **own})
    rows[0] |= {"note": " (rounding)", "speed": f"{longest['bf16_us']:.0f} us"}
    return formatted(rows, FIRST)


def _rows(name: str, columns: dict[str, str], group: str = "rows") -> Callable[[], str]:
    return lambda: formatted(results(name)[group], columns)


SILENTLY, WARNING, THIS_STEP = "no warning", "one warning", "this step only"
THEN = {
    "device": ("the model", SILENTLY),
    "press": ("the press", SILENTLY),
    "mode": ("the call", SILENTLY),
    "model": ("the model", WARNING),
    "cache": ("the cache", f"{WARNING}, if a layer is packed"),
    "changes": ("the cache", WARNING),
    "compiled_under": ("`compile=True`", "an error"),
    "mask": ("the step", THIS_STEP),
    "gradients": ("the step", THIS_STEP),
    "others_sample": ("the call", "until that call ends"),
}
"""What each kind of rule looks at, and what comes of it."""


def capture_rules() -> str:
    """Every rule; the values that its message names are in italics."""
    lines = ["| a step is not captured if | looks at | then |", "|---|---|---|"]
    for kind, rules in RULES.items():
        subject, then = THEN[kind]
        for rule in rules:
            waits = kind == "cache" and not rule.lasting
            message = re.sub(r"\{(.*?)\}", r"*\1*", rule.message)
            lines.append(f"| {message} | {subject} | {'until it has more tokens' if waits else then} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "first": first,
    "attention-short": lambda: attention(short=True),
    "generation": generation,
    "reading": _rows("generation", READING, "reading"),
    "settings": settings,
    "changed-1024": lambda: changed_settings(1024),
    "changed-4096": lambda: changed_settings(4096),
    "sinks": _rows("defaults", SINKS, "sinks"),
    "quick": lambda: evaluation.divergence("evaluation_quick"),
    "quick-pairs": lambda: evaluation.pairs("evaluation_quick"),
    "quick-grid": lambda: evaluation.equal_bytes("evaluation_quick"),
    "quick-tasks": lambda: evaluation.tasks("evaluation_quick"),
    "full": lambda: evaluation.divergence("evaluation_full", "median", "perplexity", "attention KL"),
    "full-pairs": lambda: evaluation.pairs("evaluation_full"),
    "attention": lambda: attention(short=False),
    "packing": _rows("encode", PACKING),
    "peers": _rows("peers", PEERS),
    "capture-rules": capture_rules,
    **{
        f"{short}-{name}": functools.partial(evaluation.evictors, f"evaluation_{long}", budget)
        for short, long in (("six", "six_evictors"), ("full", "full"))
        for name, budget in BUDGETS.items()
    },
}


def written(page: Path) -> str:
    """The text of a page with its tables as they should be."""
    return MARKED.sub(lambda one: one[1] + TABLES[one["name"]]() + one[4], page.read_text(encoding="utf-8"))


def stale() -> list[str]:
    """Names of pages whose tables are not what would be written."""
    return [page.name for page in PAGES if page.read_text(encoding="utf-8") != written(page)]


def write() -> None:
    """Write the tables of every page, and the picture where matplotlib is installed."""
    for page in PAGES:
        page.write_text(written(page), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        draw()


def draw() -> None:
    """Draw docs/divergence.png, KL against bits a value."""
    from quantpress.evaluation.results.figures import DPI, divergence_plot

    rows: list[Any] = [SimpleNamespace(**row) for row in _arms().values()]
    figure = divergence_plot(rows)
    if figure is not None:
        figure.savefig(DOCS / "divergence.png", dpi=DPI)
