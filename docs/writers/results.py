"""Files of docs/results/, and the form of a table in Markdown.

A file says what was measured, when, where and with which versions.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]

Row = dict[str, Any]


@functools.cache
def results(name: str) -> Row:
    """What docs/results/NAME.json holds."""
    found: Row = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, with a newline at its end."""
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (headers, *rows)]
    return "\n".join([cells[0], "|" + "---|" * len(headers), *cells[1:]]) + "\n"
