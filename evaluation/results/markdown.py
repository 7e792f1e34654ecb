"""The tables of a run, in Markdown."""

from collections.abc import Callable, Sequence

from quantpress.evaluation.results.records import REFUSED, Records
from quantpress.evaluation.results.summary import (
    WEAK,
    DivergenceRow,
    Findings,
    PairRow,
    TaskRow,
    pareto_front,
    weak_tasks,
)


def report(records: Records, findings: Findings) -> str:
    """Everything that a run has found, as one page."""
    parts = [_heading(records)]
    if findings.fidelity:
        parts += ["## Fidelity of continuations", DIVERGENCE_NOTE, divergence_table(findings.fidelity)]
    if findings.pairs:
        parts += ["## Against TurboQuant as published", PAIR_NOTE, pair_table(findings.pairs)]
    if findings.grid:
        parts += ["## Eviction and bits at equal bytes", GRID_NOTE, grid_table(findings.grid)]
        parts += [_budget_note(findings.grid)]
    if findings.tasks:
        in_view = records.settings.get("suite", {}).get("question_aware", False)
        parts += ["## Tasks, with the question in view of the press" if in_view else "## Tasks"]
        parts += [TASK_NOTE, task_table(findings.tasks), _weak_note(findings.tasks)]
    refused = [f"- {line['arm']}, {line['case']}: {line['reason']}" for line in records.of(REFUSED)]
    if refused:
        parts += ["## Refused", "\n".join(refused)]
    return "\n\n".join(part for part in parts if part) + "\n"


BUDGET_TOLERANCE = 0.01

DIVERGENCE_NOTE = """\
KL(uncompressed || compressed) in nats over the tokens of each continuation, teacher-forced through the
compressed cache; agreement is of the most likely token; perplexity ratio is to the uncompressed model on the
same tokens. In brackets 95 % bootstrap intervals over documents. Bits a value and ratio are measured bytes
against all tokens read; the ratio is to those tokens uncompressed, in the dtype above. Attention is the
error |o' - o| / |o| over the context, the mean of all heads and the worst head. The row `uncompressed` is
what rounding and chunks alone change: no arm can be told from it below that."""

PAIR_NOTE = """\
How many times lower the mean KL is than that of TurboQuant as published in as many bits, with 95 % bootstrap
intervals over documents: as measured, and less the KL of the row `uncompressed`, document by document."""

GRID_NOTE = """\
The tokens kept are chosen so that every row of one budget has at most its bytes. In bold: the front, where no
other row has fewer bytes and less divergence."""

TASK_NOTE = """\
Mean scores, 0 to 1, of identical prompts, greedy. Difference is to the uncompressed cache, case by case, with
its 95 % bootstrap interval; lost and gained count cases answered fully right, with McNemar's exact p."""


DIVERGENCE: dict[str, Callable[[DivergenceRow], str]] = {
    "cache": lambda row: row.arm,
    "bits a value": lambda row: f"{row.bits_per_value:.2f}",
    "ratio": lambda row: f"{row.ratio:.2f}x",
    "KL mean": lambda row: f"{row.kl:.4f}",
    "median": lambda row: f"{row.kl_median:.4f}",
    "99 %": lambda row: f"{row.kl_p99:.3f}",
    "agreement": lambda row: f"{row.agreement:.3f}",
    "perplexity": lambda row: f"{row.perplexity.value:.2f}",
    "perplexity ratio": lambda row: f"{row.perplexity_ratio:.4f}",
    "attention error, worst": lambda row: (
        "" if row.attention_error is None else "{:.3f}, {:.3f}".format(*row.attention_error)
    ),
    "attention KL": lambda row: "" if row.attention_kl is None else f"{row.attention_kl:.4f}",
}
"""Columns of a table of arms."""


def divergence_table(rows: Sequence[DivergenceRow], left_out: Sequence[str] = ()) -> str:
    """One row for each arm; `left_out` names columns."""
    columns = {header: cell for header, cell in DIVERGENCE.items() if header not in left_out}
    return table([*columns], [[cell(row) for cell in columns.values()] for row in rows])


def pair_table(rows: Sequence[PairRow]) -> str:
    """One row for each pair; KL less rounding where that is known."""
    headers = ["cache", "bits a value", "as published", "bits a value", "KL ratio", "less rounding"]
    cells = [
        [row.arm, f"{row.bits:.2f}", row.published, f"{row.published_bits:.2f}", f"{row.ratio:.2f}"]
        + ([] if row.net is None else [f"{row.net:.2f}"])
        for row in rows
    ]
    width = max(map(len, cells))
    return table(headers[:width], [line + [""] * (width - len(line)) for line in cells])


def grid_table(rows: Sequence[DivergenceRow]) -> str:
    """One row for each arm, from few bytes to many; the front is bold."""
    front = {row.arm for row in pareto_front(rows)}
    columns = ("KL mean", "median", "99 %", "agreement", "perplexity ratio")
    lines = [
        [
            f"**{row.arm}**" if row.arm in front else row.arm,
            f"{1 / row.ratio:.4f}",
            *(DIVERGENCE[header](row) for header in columns),
        ]
        for row in sorted(rows, key=lambda row: row.resident_bytes)
    ]
    return table(("kept", "part of the bytes", *columns), lines)


def task_table(rows: Sequence[TaskRow]) -> str:
    """One row for each arm and one column for each task; weak tasks are marked."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.scores))
    weak = weak_tasks(rows)
    headers = ["cache", "ratio", *(f"{task} †" if task in weak else task for task in tasks)]
    headers += ["all", "difference", "lost", "gained", "p"]
    return table(
        headers,
        [
            (
                row.arm,
                f"{row.ratio:.2f}x",
                *(f"{row.scores[task]:.2f}" if task in row.scores else "" for task in tasks),
                f"{row.mean:.2f}",
                f"{row.difference:.2f}",
                str(row.test.lost),
                str(row.test.gained),
                f"{row.test.p_value:.3f}",
            )
            for row in rows
        ],
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    r"""A Markdown table.

    Example:
        >>> print(table(("a", "b"), [("x | y", "1")]))
        | a | b |
        |---|---|
        | x \| y | 1 |
    """
    lines = [headers, *rows]
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([cells[0], "|" + "---|" * len(headers), *cells[1:]])


def _heading(records: Records) -> str:
    found = records.settings
    suite = found.get("suite", {})
    return (
        f"# Evaluation of {found.get('model')}, suite {suite.get('name')}\n\n"
        f"{found.get('dtype')} on {found.get('device')}, torch {found.get('torch')}, transformers "
        f"{found.get('transformers')}, kvpress {found.get('kvpress')}, seed {found.get('seed')}. "
        f"{suite.get('documents')} documents of {suite.get('context')} + {suite.get('continuation')} tokens."
    )


def _budget_note(rows: Sequence[DivergenceRow]) -> str:
    """Names the rows whose measured bytes are off their budget."""
    off = {row.arm: 1 / row.ratio / row.budget - 1 for row in rows if row.budget}
    shown = ", ".join(f"{arm} {part:+.1%}" for arm, part in off.items() if abs(part) > BUDGET_TOLERANCE)
    return shown and f"More than {BUDGET_TOLERANCE:.0%} over or under the bytes of the budget: {shown}."


def _weak_note(rows: Sequence[TaskRow]) -> str:
    weak = ", ".join(f"{task} {score:.2f}" for task, score in weak_tasks(rows).items())
    return weak and (
        f"† The uncompressed model itself scores below {WEAK}: {weak}. Differences there say little about a "
        "cache."
    )
