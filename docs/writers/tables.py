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
import rule_tables as rules
import setting_tables as settings
import speed_tables as speed
from results import DOCS, results

PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
BUDGETS = {"quarter": 1 / 4, "eighth": 1 / 8, "sixteenth": 1 / 16}
TABLES: dict[str, Callable[[], str]] = {
    "first": settings.first,
    "attention-short": speed.attention_short,
    "generation": speed.generation,
    "reading": speed.reading,
    "settings": settings.settings,
    "changed-1024": lambda: settings.changed_settings(1024),
    "changed-4096": lambda: settings.changed_settings(4096),
    "sinks": settings.sinks,
    "quick": lambda: evaluation.divergence("evaluation_quick"),
    "quick-pairs": lambda: evaluation.pairs("evaluation_quick", less_rounding=True),
    "quick-grid": lambda: evaluation.equal_bytes("evaluation_quick"),
    "quick-tasks": lambda: evaluation.tasks("evaluation_quick"),
    "full": lambda: evaluation.divergence("evaluation_full", "median", "perplexity", "attention KL"),
    "full-pairs": lambda: evaluation.pairs("evaluation_full", less_rounding=False),
    "attention": speed.attention,
    "packing": speed.packing,
    "peers": speed.peers,
    "capture-rules": rules.capture_rules,
    **{
        f"{short}-{name}": functools.partial(evaluation.evictors, f"evaluation_{long}", budget)
        for short, long in (("six", "six_evictors"), ("full", "full"))
        for name, budget in BUDGETS.items()
    },
}


def written(page: Path) -> str:
    """The text of a page with its tables as they should be."""
    return MARKED.sub(
        lambda found: found[1] + TABLES[found["name"]]() + found[4], page.read_text(encoding="utf-8")
    )


def stale() -> list[str]:
    """Names of pages whose tables are not what would be written."""
    return [page.name for page in PAGES if page.read_text(encoding="utf-8") != written(page)]


def write() -> None:
    """Write the tables of every page."""
    for page in PAGES:
        page.write_text(written(page), encoding="utf-8")


def draw() -> None:
    """Draw docs/divergence.png, KL against bits a value, where matplotlib is installed."""
    from quantpress.evaluation.results.figures import DPI, divergence_plot
    from quantpress.evaluation.results.statistics import Estimate

    rows: list[Any] = [
        SimpleNamespace(**{**row, "kl": Estimate(**row["kl"])})
        for row in results("evaluation_quick")["fidelity"]
    ]
    figure = divergence_plot(rows) if importlib.util.find_spec("matplotlib") else None
    if figure is not None:
        figure.savefig(DOCS / "divergence.png", dpi=DPI)
