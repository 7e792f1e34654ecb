"""Tables of docs/choosing.md: which presses keep answers, with the question in view and without it."""

import re

from results import Row, formatted, results

from quantpress.evaluation.arms import UNCOMPRESSED
from quantpress.evaluation.results.markdown import table

IN_VIEW = {
    "cache": "`{cache}`",
    "right, question behind": "{blind} of {cases}",
    "right, question in view": "{in view} of {cases}",
    "smaller": "{ratio:.1f}x",
}


def in_view() -> str:
    """A line for each press: right answers both ways, and bytes."""
    return formatted(results("question_in_view")["rows"], IN_VIEW)


def equal_bytes() -> str:
    """A line for each way to use an evictor, two columns for each model and length."""
    runs = results("answers_at_equal_bytes")["runs"]
    columns = [
        name for run in runs for name in (f"{run['called']}, {run['context']:,} tokens: right", "KL, nats")
    ]
    presses = list(dict.fromkeys(row["press"] for run in reversed(runs) for row in run["rows"]))
    presses.sort(key=_evictor)
    by_press = [{row["press"]: row for row in run["rows"]} for run in runs]
    lines = [
        [f"`{press.replace('{}', 'r')}`", *(cell for rows in by_press for cell in _cells(rows[press]))]
        for press in presses
    ]
    return table(["cache", *columns], lines) + "\n"


def _evictor(press: str) -> tuple[bool, bool, str, int]:
    """Presses with a ratio behind the others; those of one evictor together, shortest first."""
    name = re.sub(r"^Demote\(|, bits=.*|\({}.*", "", press)
    return "{}" in press, press != UNCOMPRESSED, name, len(press)


def _cells(row: Row) -> tuple[str, str]:
    share = "" if row["equal"] or row["press"] == UNCOMPRESSED else f", {row['ratio']:.1f}x"
    kl = f"{row['kl']:.3f}" if "kl" in row else ""
    return f"{row['blind']}, {row['in_view']} of {row['cases']}{share}", kl


TABLES = {"question-in-view": in_view, "equal-bytes-answers": equal_bytes}
