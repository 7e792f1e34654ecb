"""Tables of the evaluation, from results in the form that `quantpress eval --json` prints.

So a new output of that command can replace a file of docs/results/. Files that were read off a published page
have `share`, `front` and `over_budget` in place of the exact bytes that they follow from.
"""

from collections.abc import Callable

from results import Row, results, table

OFF_BUDGET = 0.01  # bytes over or under a budget that a cell has to say
WEAK = 0.5  # score of the uncompressed model below which a task is marked


def interval(estimate: Row | None, digits: int) -> str:
    """A figure with its interval, where it has one."""
    if estimate is None:
        return ""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    return f"{value:.{digits}f}" + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")


# Columns of divergence: the header, and the cell of a row.
DIVERGENCE: dict[str, Callable[[Row], str]] = {
    "cache": lambda row: row["arm"],
    "bits a value": lambda row: f"{row['bits_per_value']:.2f}",
    "ratio": lambda row: f"{row['ratio']:.2f}x",
    "KL mean": lambda row: interval(row["kl"], 4),
    "median": lambda row: interval(row["kl_median"], 4),
    "99 %": lambda row: interval(row["kl_p99"], 3),
    "agreement": lambda row: interval(row["agreement"], 3),
    "perplexity": lambda row: f"{row['perplexity']['value']:.2f}",
    "perplexity ratio": lambda row: interval(row["perplexity_ratio"], 4),
    "attention error, worst": lambda row: "{:.3f}, {:.3f}".format(*row["attention_error"]),
    "attention KL": lambda row: "" if row["attention_kl"] is None else f"{row['attention_kl']:.4f}",
}


def divergence(name: str, *left_out: str) -> str:
    """Arms against the uncompressed model; `left_out` names columns."""
    columns = {header: cell for header, cell in DIVERGENCE.items() if header not in left_out}
    return table(
        list(columns), ([cell(row) for cell in columns.values()] for row in results(name)["fidelity"])
    )


def pairs(name: str, less_rounding: bool) -> str:
    """Arms against TurboQuant as published."""
    headers = ["cache", "bits a value", "as published", "bits a value", "KL ratio", "less rounding"]
    rows = []
    for row in results(name)["pairs"]:
        bits = (f"{row['bits']:.2f}", f"{row['published_bits']:.2f}")
        rows.append([row["arm"], bits[0], row["published"], bits[1], interval(row["ratio"], 2)])
        rows[-1] += [interval(row["net"], 2)] if less_rounding else []
    return table(headers if less_rounding else headers[:-1], rows)


def equal_bytes(name: str) -> str:
    """Arms of equal bytes, one a line; the front is bold."""
    headers = ("kept", "part of the bytes", "KL mean", "median", "99 %", "agreement", "perplexity ratio")
    rows, lowest = [], float("inf")
    for row in sorted(results(name)["grid"], key=_share):
        best = row.get("front", row["kl"]["value"] < lowest)
        lowest = min(lowest, row["kl"]["value"])
        arm = f"**{row['arm']}**" if best else row["arm"]
        rows.append([arm, f"{_share(row):.4f}", *(DIVERGENCE[header](row) for header in headers[2:])])
    return table(headers, rows)


def _share(row: Row) -> float:
    """Bytes of an arm as a part of the whole context's, uncompressed."""
    return float(row["share"] if "share" in row else 1 / row["ratio"])


def _over_budget(row: Row) -> float:
    """How far the bytes of an arm are over its budget, as a part of the budget."""
    return float(_share(row) / row["budget"] - 1 if "ratio" in row else row.get("over_budget", 0))


def evictors(name: str, budget: float) -> str:
    """KL of one budget, a line for each evictor and a column for each width; the lowest is bold."""
    rows = [row for row in results(name)["grid"] if row["budget"] == budget]
    lowest = min(row["kl"]["value"] for row in rows)
    columns: dict[str, tuple[str, dict[str, str]]] = {}
    for row in rows:
        press, _, rest = row["arm"].partition(", ")
        press = press.partition(" within ")[0]
        tokens, _, bits = rest.rpartition(", ")
        every = press == "every token"
        header, cells = columns.setdefault(bits, (f"{'all tokens' if every else tokens}, {bits}", {}))
        over = _over_budget(row)
        off = f" ({over:+.0%} bytes)" if abs(over) > OFF_BUDGET else ""
        kl = interval(row["kl"], 4)
        cell = f"**{kl}**" if row["kl"]["value"] == lowest else kl
        columns[bits] = (header + off if every else header, cells)
        cells[press] = cell + ("" if every else off)
    names = list(dict.fromkeys(press for _, cells in columns.values() for press in cells))
    lines = (
        [press, *(cells.get(press) or cells["every token"] for _, cells in columns.values())]
        for press in names
        if press != "every token"
    )
    return table(["evictor", *(header for header, _ in columns.values())], lines)


def tasks(name: str) -> str:
    """Scores of answers; weak tasks are marked."""
    rows = results(name)["tasks"]
    reference = rows[0]["scores"]
    names = [f"{task} †" if score < WEAK else task for task, score in reference.items()]
    headers = ["cache", "ratio", *names, "all", "difference", "lost", "gained", "p"]
    lines = []
    for row in rows:
        test = row["test"]
        scores = [f"{row['scores'][task]:.2f}" for task in reference]
        figures = [interval(row["mean"], 2), interval(row["difference"], 2)]
        counts = [str(test["lost"]), str(test["gained"]), f"{test['p_value']:.3f}"]
        lines.append([row["arm"], f"{row['ratio']:.2f}x", *scores, *figures, *counts])
    return table(headers, lines)
