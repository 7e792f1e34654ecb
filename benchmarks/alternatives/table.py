"""Rows of `benchmarks/peers.py` and their table."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

BASELINE = "torch bfloat16"


@dataclass(frozen=True)
class Row:
    """What was measured; `note` says which of several ways was fastest, or what went wrong."""

    name: str
    version: str
    bits: str
    tokens: int
    us: float | None = None
    timing: str = ""
    ratio: float | None = None
    bytes: float | None = None
    error: float | None = None
    own_error: float | None = None
    note: str = ""


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows with how many times faster they are than bfloat16 attention of the same run."""
    dense = {row.tokens: row.us for row in rows if row.name == BASELINE and row.us}
    return [
        replace(row, ratio=dense[row.tokens] / row.us) if row.us and row.tokens in dense else row
        for row in rows
    ]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "alternative": lambda row: f"{row.name} {row.version}".strip(),
    "K/V bits": lambda row: row.bits,
    "tokens": lambda row: str(row.tokens),
    "us": lambda row: "" if row.us is None else f"{row.us:.1f}",
    "against bf16": lambda row: "" if row.ratio is None else f"{row.ratio:.2f}x",
    "timing": lambda row: row.timing,
    "bytes": lambda row: "" if row.bytes is None else f"{row.bytes:.0f}",
    "error": lambda row: "" if row.error is None else f"{row.error:.3f}",
    "own": lambda row: "" if row.own_error is None else f"{row.own_error:.1e}",
    "note": lambda row: row.note,
}


def show(rows: list[Row]) -> None:
    """Print the table."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table = Table(title=f"{device}, torch {torch.__version__}")
    for name in COLUMNS:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    Console(width=150).print(table)
