"""Tables of plans: what they save, and how well one pass ranks layers."""

from collections.abc import Callable

from results import Row, formatted, results

from quantpress.evaluation.results.markdown import table
from quantpress.evaluation.results.statistics import Estimate

MODELS = ("plans", "plans_qwen")
PLANS = {
    "mean width": "{mean:.1f}",
    "widths": "{widths}",
    "bits a value": "{bits_per_value:.2f}",
    "KL, nats": "{kl:.5f}",
    "ratio": "{ratio:.2f}",
}
RANKS = {"model": "{model}", "bits": "{bits}"} | {of: f"{{{of}:.2f}}" for of in ("all", "keys", "values")}
MEANS = (2.0, 2.5, 3.0)
WIDTHS = "1 to 8 bits"
"""The choice of widths that the summary is of."""


def rows(name: str) -> str:
    """One width and the plans within its bytes, a line each."""
    return formatted(results(name)["rows"], PLANS)


def summary() -> str:
    """KL ratios of plans layer by layer of `WIDTHS`, by mean width, of each model."""
    scalar, trellis = f"layer by layer, {WIDTHS}", f"trellis, layer by layer, {WIDTHS}"
    lines = []
    for found in map(results, MODELS):
        rows, over = found["rows"], found["trellis_over_plans"]
        for plan, baseline, ratios in (
            ("scalar codes", "one width, scalar codes", _ratios(rows, scalar)),
            ("trellis codes", "one width, scalar codes", _ratios(rows, trellis)),
            ("trellis codes", "a plan, scalar codes", _ratios(over, WIDTHS)),
        ):
            lines.append([found["model"], f"a plan, {plan}", baseline, *(f"{one:.2f}" for one in ratios)])
    return table(["model", "KL of", "over that of", *(f"mean {mean}" for mean in MEANS)], lines) + "\n"


def _ratios(rows: list[Row], widths: str) -> list[Estimate]:
    found = {row["mean"]: row["ratio"] for row in rows if row["widths"] == widths}
    return [found[mean] for mean in MEANS]


def ranks() -> str:
    """Rank correlation of the estimates with what is measured layer by layer, by model and width."""
    every = map(results, MODELS)
    lines = (
        {"model": one["model"], "bits": n, **row} for one in every for n, row in one["correlation"].items()
    )
    return formatted(lines, RANKS)


def by_head() -> str:
    """Plans by layer and by head; those by head beside those by layer of the same widths to choose from."""
    found = results("plans_by_head")["rows"]
    over = (f"{row['over_layers']:.2f}" if "over_layers" in row else "" for row in found)
    columns = {**PLANS, "of the KL by layer": "{over}"}
    return formatted(({**row, "over": one} for row, one in zip(found, over, strict=True)), columns)


TABLES: dict[str, Callable[[], str]] = {
    "plans-summary": summary,
    "plans": lambda: rows("plans"),
    "plans-qwen": lambda: rows("plans_qwen"),
    "plans-by-head": by_head,
    "plan-ranks": ranks,
}
