"""Tables of the evaluation, from results in the form that `quantpress eval --json` prints.

So a new output of that command can replace a file of docs/results/. Files that were read off a published page
have `share` or `over_budget` in place of the exact bytes that they follow from.
"""

from types import SimpleNamespace
from typing import Any

from results import Nothing, results

from quantpress.evaluation.results import markdown
from quantpress.evaluation.results.statistics import McNemar

OFF_BUDGET = 0.01  # bytes over or under a budget that a cell has to say


def rows_of(name: str, group: str) -> list[Any]:
    """Rows of an evaluation with the fields that the tables of `quantpress eval` read."""
    rows = []
    for found in results(name)[group]:
        row = {name: None if isinstance(value, Nothing) else value for name, value in found.items()}
        if "share" in row:
            row |= {"ratio": 1 / row["share"], "resident_bytes": row["share"]}
        if "test" in row:
            row["test"] = McNemar(**row["test"])
        rows.append(SimpleNamespace(**{"net": None, **row}))
    return rows


def divergence(name: str, *left_out: str) -> str:
    """Arms against the uncompressed model; `left_out` names columns."""
    return markdown.divergence_table(rows_of(name, "fidelity"), left_out) + "\n"


def pairs(name: str) -> str:
    """Arms against TurboQuant as published."""
    return markdown.pair_table(rows_of(name, "pairs")) + "\n"


def equal_bytes(name: str) -> str:
    """Arms of equal bytes, one a line."""
    return markdown.grid_table(rows_of(name, "grid")) + "\n"


def tasks(name: str) -> str:
    """Scores of answers."""
    return markdown.task_table(rows_of(name, "tasks")) + "\n"


def _over_budget(row: Any) -> float:
    """How far the bytes of an arm are over its budget, as a part of the budget."""
    exact = vars(row).get("ratio")
    return float(1 / exact / row.budget - 1 if exact else vars(row).get("over_budget", 0))


def evictors(name: str, budget: float) -> str:
    """KL of one budget, a line for each evictor and a column for each width; the lowest is bold."""
    rows = [row for row in rows_of(name, "grid") if row.budget == budget]
    lowest = min(row.kl.value for row in rows)
    columns: dict[str, dict[str, str]] = {}
    headers: dict[str, str] = {}
    for row in rows:
        press, *kept, bits = row.arm.split(", ")
        press = press.partition(" within ")[0]
        over = _over_budget(row)
        off = f" ({over:+.0%} bytes)" if abs(over) > OFF_BUDGET else ""
        cell = f"**{row.kl:.4f}**" if row.kl.value == lowest else f"{row.kl:.4f}"
        if press == "every token":
            headers[bits], off = f"all tokens, {bits}{off}", ""
        headers.setdefault(bits, ", ".join([*kept, bits]))
        columns.setdefault(bits, {})[press] = cell + off
    presses = dict.fromkeys(press for cells in columns.values() for press in cells if press != "every token")
    lines = [
        [press, *(cells.get(press) or cells["every token"] for cells in columns.values())]
        for press in presses
    ]
    return markdown.table(["evictor", *headers.values()], lines) + "\n"
