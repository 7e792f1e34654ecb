"""Reads the files of docs/results/ and formats their rows.

A file says what was measured, when, where and with which versions. In its rows {"value", "low", "high"} is a
figure with its interval, as `quantpress eval --json` prints it, and [us, ratio] is a time and its speed-up.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from quantpress.evaluation.results.markdown import table
from quantpress.evaluation.results.statistics import Estimate

DOCS = Path(__file__).parents[1]

Row = dict[str, Any]


class Times(NamedTuple):
    """Microseconds, and how many times faster than the baseline that is."""

    us: float
    ratio: float

    def __format__(self, spec: str) -> str:
        return f"{self.us:.{int(self.us < 1000)}f} ({self.ratio:.{2 if self.ratio >= 0.095 else 3}f}x)"


class Nothing:
    """What was not measured: an empty cell."""

    def __format__(self, spec: str) -> str:
        return ""


@functools.cache
def results(name: str) -> Row:
    """What docs/results/NAME.json holds."""
    found: Row = json.loads((DOCS / "results" / f"{name}.json").read_text("utf-8"), object_hook=_object)
    return found


def measured(name: str) -> Row | None:
    """The same, or None where there is no such file yet."""
    return results(name) if (DOCS / "results" / f"{name}.json").exists() else None


def _object(found: Row) -> Any:
    if found.keys() == {"value", "low", "high"}:
        return Estimate(**found)
    return {name: _value(value) for name, value in found.items()}


def _value(value: Any) -> Any:
    pair = isinstance(value, list) and len(value) == 2 and all(isinstance(one, float | int) for one in value)
    return Nothing() if value is None else Times(*value) if pair else value


def formatted(rows: Iterable[Row], columns: Mapping[str, str]) -> str:
    """A table of rows; each column has a header and a format string over the fields of a row."""
    return table([*columns], [[cell.format(**row) for cell in columns.values()] for row in rows]) + "\n"
