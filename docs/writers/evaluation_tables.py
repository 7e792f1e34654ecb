"""Tables of the evaluation, from results in the form that `quantpress eval --json` prints.

So a new output of that command can replace a file of docs/results/. Files that were read off a published page
have `share`, `front` and `over_budget` in place of the exact bytes that they follow from.
"""

from results import Row, formatted, results

from quantpress.evaluation.results.markdown import table

OFF_BUDGET = 0.01  # bytes over or under a budget that a cell has to say
WEAK = 0.5  # score of the uncompressed model below which a task is marked

DIVERGENCE = {
    "cache": "{arm}",
    "bits a value": "{bits_per_value:.2f}",
    "ratio": "{ratio:.2f}x",
    "KL mean": "{kl:.4f}",
    "median": "{kl_median:.4f}",
    "99 %": "{kl_p99:.3f}",
    "agreement": "{agreement:.3f}",
    "perplexity": "{perplexity.value:.2f}",
    "perplexity ratio": "{perplexity_ratio:.4f}",
    "attention error, worst": "{attention_error[0]:.3f}, {attention_error[1]:.3f}",
    "attention KL": "{attention_kl:.4f}",
}
EQUAL_BYTES = {
    "kept": "{arm}",
    "part of the bytes": "{share:.4f}",
    **{name: DIVERGENCE[name] for name in ("KL mean", "median", "99 %", "agreement", "perplexity ratio")},
}


def divergence(name: str, *left_out: str) -> str:
    """Arms against the uncompressed model; `left_out` names columns."""
    columns = {header: cell for header, cell in DIVERGENCE.items() if header not in left_out}
    return formatted(results(name)["fidelity"], columns)


def pairs(name: str, less_rounding: bool) -> str:
    """Arms against TurboQuant as published."""
    headers = ["cache", "bits a value", "as published", "bits a value", "KL ratio"]
    cells = ["{arm}", "{bits:.2f}", "{published}", "{published_bits:.2f}", "{ratio:.2f}"]
    if less_rounding:
        headers, cells = [*headers, "less rounding"], [*cells, "{net:.2f}"]
    rows = [[cell.format(**row) for cell in cells] for row in results(name)["pairs"]]
    return table(headers, rows) + "\n"


def equal_bytes(name: str) -> str:
    """Arms of equal bytes, one a line; the front is bold."""
    rows, lowest = [], float("inf")
    for row in sorted(results(name)["grid"], key=_share):
        best = row.get("front", row["kl"].value < lowest)
        lowest = min(lowest, row["kl"].value)
        rows.append({**row, "share": _share(row), "arm": f"**{row['arm']}**" if best else row["arm"]})
    return formatted(rows, EQUAL_BYTES)


def _share(row: Row) -> float:
    """Bytes of an arm as a part of the whole context's, uncompressed."""
    return float(row["share"] if "share" in row else 1 / row["ratio"])


def _over_budget(row: Row) -> float:
    """How far the bytes of an arm are over its budget, as a part of the budget."""
    return float(_share(row) / row["budget"] - 1 if "ratio" in row else row.get("over_budget", 0))


def evictors(name: str, budget: float) -> str:
    """KL of one budget, a line for each evictor and a column for each width; the lowest is bold."""
    rows = [row for row in results(name)["grid"] if row["budget"] == budget]
    lowest = min(row["kl"].value for row in rows)
    columns: dict[str, dict[str, str]] = {}
    headers: dict[str, str] = {}
    for row in rows:
        press, *kept, bits = row["arm"].split(", ")
        press = press.partition(" within ")[0]
        over = _over_budget(row)
        off = f" ({over:+.0%} bytes)" if abs(over) > OFF_BUDGET else ""
        cell = f"**{row['kl']:.4f}**" if row["kl"].value == lowest else f"{row['kl']:.4f}"
        if press == "every token":
            headers[bits], off = f"all tokens, {bits}{off}", ""
        headers.setdefault(bits, ", ".join([*kept, bits]))
        columns.setdefault(bits, {})[press] = cell + off
    presses = dict.fromkeys(press for cells in columns.values() for press in cells if press != "every token")
    lines = [
        [press, *(cells.get(press) or cells["every token"] for cells in columns.values())]
        for press in presses
    ]
    return table(["evictor", *headers.values()], lines) + "\n"


def tasks(name: str) -> str:
    """Scores of answers; weak tasks are marked."""
    rows = results(name)["tasks"]
    scores = {
        f"{task} †" if score < WEAK else task: f"{{scores[{task}]:.2f}}"
        for task, score in rows[0]["scores"].items()
    }
    return formatted(
        rows,
        {
            "cache": "{arm}",
            "ratio": "{ratio:.2f}x",
            **scores,
            "all": "{mean:.2f}",
            "difference": "{difference:.2f}",
            "lost": "{test[lost]}",
            "gained": "{test[gained]}",
            "p": "{test[p_value]:.3f}",
        },
    )
