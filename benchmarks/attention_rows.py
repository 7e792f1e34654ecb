"""Rows of attention.py: the table that it prints, and the file that it writes and goes on with."""

import datetime
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from fp8_attention import Measured
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Shape:
    """One row of the table, without the widths."""

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int
    layout: str = "contiguous"


@dataclass(frozen=True)
class Row:
    """What was measured: one pair of widths, beside bfloat16 and FP8 on the same shape."""

    shape: Shape
    key_bits: int
    value_bits: int
    us: float
    bytes: int
    error: float
    dense_us: float
    fp8: Measured | None


def show(rows: list[Row]) -> None:
    """Print the table, and which way of attending FP8 was the fastest."""
    device = torch.cuda.get_device_properties(0)
    table = Table(
        title=f"{device.name}, torch {torch.__version__}, triton {triton.__version__}; microseconds"
    )
    names = ("B", "Hq", "Hkv", "d", "N", "pages", "bf16", "fp8", "K/V bits", "ours", "to bf16", "to fp8")
    for name in (*names, "MiB", "TB/s", "error"):
        table.add_column(name, justify="right")
    for row in rows:
        shape, fp8 = row.shape, row.fp8
        table.add_row(
            *(str(n) for n in (shape.batch, shape.kv_heads * shape.group, shape.kv_heads, shape.head_dim)),
            str(shape.tokens),
            shape.layout,
            f"{row.dense_us:.1f}",
            f"{fp8.us:.1f}" if fp8 else "",
            f"{row.key_bits}/{row.value_bits}",
            f"{row.us:.1f}",
            f"{row.dense_us / row.us:.2f}x",
            f"{fp8.us / row.us:.2f}x" if fp8 else "",
            f"{row.bytes / 2**20:.1f}",
            f"{row.bytes / row.us / 1e6:.2f}",
            f"{row.error:.1e}",
        )
    Console(width=130).print(table)
    for shape, same in itertools.groupby(rows, key=lambda row: row.shape):
        if fp8 := next(same).fp8:
            print(f"fp8, {shape.batch} x {shape.tokens} tokens: {fp8.name}, error {fp8.error:.1e}")


def results(rows: list[Row]) -> str:
    """The rows as docs/results/attention_*.json have them: a line a shape, [us, ratio to bf16] a pair."""
    lines = []
    for shape, same in itertools.groupby(rows, key=lambda row: row.shape):
        pairs = {f"{row.key_bits}/{row.value_bits}": row for row in same}
        first = next(iter(pairs.values()))
        line: dict[str, Any] = {"batch": shape.batch, "query_heads": shape.kv_heads * shape.group}
        line |= {"kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "tokens": shape.tokens}
        line |= {"layout": shape.layout, "bf16_us": first.dense_us}
        if fp8 := first.fp8:
            line |= {"fp8_us": fp8.us, "fp8_way": fp8.name, "fp8_error": fp8.error}
        line |= {bits: [row.us, row.dense_us / row.us] for bits, row in pairs.items()}
        line["bytes"] = {bits: row.bytes for bits, row in pairs.items()}
        line["errors"] = {bits: row.error for bits, row in pairs.items()}
        lines.append(line)
    found = {
        "command": "python benchmarks/attention.py --full",
        "date": datetime.date.today().isoformat(),
        "machine": f"one {torch.cuda.get_device_name().removeprefix('NVIDIA ')}",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "source": "The --json file of the command.",
    }
    head = json.dumps(found, indent=1).removesuffix("\n}")
    return f'{head},\n "rows": [\n' + ",\n".join(f"  {json.dumps(line)}" for line in lines) + "\n ]\n}\n"


def read(path: Path | None) -> list[Row]:
    """The rows of an earlier run that was interrupted, or none."""
    rows: list[Row] = []
    for line in json.loads(path.read_text())["rows"] if path is not None and path.exists() else []:
        group = line["query_heads"] // line["kv_heads"]
        names = ("batch", "kv_heads", "tokens", "head_dim", "layout")
        shape = Shape(**{name: line[name] for name in names}, group=group)
        fp8 = Measured(line["fp8_way"], line["fp8_us"], line["fp8_error"]) if "fp8_us" in line else None
        for bits, size in line["bytes"].items():
            key_bits, value_bits = map(int, bits.split("/"))
            times = line[bits][0], size, line["errors"][bits], line["bf16_us"]
            rows.append(Row(shape, key_bits, value_bits, *times, fp8))
    return rows
