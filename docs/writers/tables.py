"""Writes the tables of measurements in the pages, and their pictures, from the files of docs/results/.

A table stands between two comments, `<!-- table: NAME -->` and `<!-- end -->`; `TABLES` says what each name
writes.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import answer_tables as answers
import evaluation_tables as evaluation
import pictures
import plan_tables as plans
import speed_tables as speed
import vllm_tables as vllm
from results import DOCS, Row, formatted, results

from quantpress.pipelines.capture.eligibility import RULES

PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
BUDGETS = {"quarter": 1 / 4, "eighth": 1 / 8, "sixteenth": 1 / 16}

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
    "KL, nats": "{kl:.4f}",
    "KL, the 0.5B": "{other:.4f}",
    "same next token": "{percent:.1f} %",
    "bits a value": "{bits_per_value:.2f}",
    "smaller": "{ratio:.2f}x",
}
FIRST_ROWS = {
    "uncompressed": "uncompressed",
    "preset balanced": '`TurboQuant.preset("balanced")`, 4 bits',
    "preset small": '`TurboQuant.preset("small")`, 3 bits',
    "SnapKV(0.5) | preset small": '`SnapKV(0.5) | TurboQuant.preset("small")`',
    "as published 3/3": "TurboQuant as published, 3 bits",
    "FP8 per tensor": "FP8 as vLLM stores it, without calibrated scales",
}
MEMORY = {"cache": "{cache}", "131072 tokens": "{gib:.1f} GiB", "smaller": "{ratio:.1f}x"}


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
    """The README's table: a run of the default model, and the KL of a run of another one."""
    arms, others = _arms(), {row["arm"]: row["kl"] for row in results("evaluation_quick_qwen")["fidelity"]}
    rows = [{**arms[arm], "cache": cache, "other": others[arm]} for arm, cache in FIRST_ROWS.items()]
    return formatted(({**row, "percent": 100 * row["agreement"].value} for row in rows), FIRST)


def memory() -> str:
    """Bytes of a long context under several presses."""
    whole, *_ = rows = results("memory")["rows"]
    return formatted(({**row, "ratio": whole["gib"] / row["gib"]} for row in rows), MEMORY)


SILENTLY, WARNING, THIS_STEP = "no warning", "one warning", "this step only"
THEN = {
    "device": ("the model", SILENTLY),
    "press": ("the press", SILENTLY),
    "mode": ("the call", SILENTLY),
    "model": ("the model", WARNING),
    "cache": ("the cache", f"{WARNING}, if a layer is packed"),
    "shared": ("the model and the cache", WARNING),
    "changes": ("the cache", WARNING),
    "compiled_under": ("`compile=True`", "an error"),
    "mask": ("the step", THIS_STEP),
    "padded": ("the step and the cache", THIS_STEP),
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


def families() -> str:
    """What comes of each family on each tested version of transformers."""
    outcomes: dict[str, dict[str, str]] = results("families")["outcomes"]
    versions = list(outcomes)
    named = {name: "{" + name.replace(".", "_") + "}" for name in versions}
    rows = [
        {"family": f"`{family}`", **{name.replace(".", "_"): outcomes[name][family] for name in versions}}
        for family in outcomes[versions[-1]]
    ]
    return formatted(rows, {"tiny model": "{family}", **named})


TABLES: dict[str, Callable[[], str]] = {
    "first": first,
    "memory": memory,
    **plans.TABLES,
    **speed.TABLES,
    "settings": settings,
    "changed-1024": lambda: changed_settings(1024),
    "changed-4096": lambda: changed_settings(4096),
    "sinks": lambda: formatted(results("defaults")["sinks"], SINKS),
    "quick": lambda: evaluation.divergence("evaluation_quick"),
    "quick-pairs": lambda: evaluation.pairs("evaluation_quick"),
    "quick-grid": lambda: evaluation.equal_bytes("evaluation_quick"),
    "quick-tasks": lambda: evaluation.tasks("evaluation_quick"),
    "quick-qwen": lambda: evaluation.divergence(
        "evaluation_quick_qwen", "median", "perplexity", "attention KL"
    ),
    "quick-qwen-pairs": lambda: evaluation.pairs("evaluation_quick_qwen"),
    "full": lambda: evaluation.divergence("evaluation_full", "median", "perplexity", "attention KL"),
    "full-pairs": lambda: evaluation.pairs("evaluation_full"),
    "full-tasks": lambda: evaluation.tasks("evaluation_full"),
    **answers.TABLES,
    "capture-rules": capture_rules,
    "families": families,
    "vllm-speed": vllm.speed,
    "vllm-two-gpus": vllm.two_gpus,
    "vllm-quality": vllm.quality,
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
    """Names of pages and pictures that are not what would be written."""
    pages = [page.name for page in PAGES if page.read_text(encoding="utf-8") != written(page)]
    return [*pages, *pictures.stale()]


def write() -> None:
    """Write the tables of every page, and the pictures where matplotlib is installed."""
    for page in PAGES:
        page.write_text(written(page), encoding="utf-8")
    pictures.write()
