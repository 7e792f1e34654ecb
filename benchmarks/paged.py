"""Decode attention of `PagedAttention` against the same tokens in pages of their own, in one run.

    python benchmarks/paged.py
    python benchmarks/paged.py --json out.json

"contiguous" reads pages in a row without a table, as the cache of a model does; "lengths" the same with the
numbers of tokens in use on the device, as every captured step has them. "rows" is a plan of every row, what
a captured step has; "listed" one of the sequences in another order. Ratios are to "lengths". The plan is made
once for all layers and timed apart, as are `write` (one token of every sequence, one layer) and `extend`
(host and device, once a step, mean over 128 steps, in which every sequence packs one page). All but `extend`
are replays of CUDA graphs. Outputs are compared first.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.testing import do_bench_cudagraph

from quantpress.cache import PagedAttention, PagedPlan
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend

HEAD_DIM, KV_HEADS, GROUP = 128, 8, 4
SHAPES = [(1, 8192), (1, 131072), (8, 8192), (8, 32768), (64, 4096)]
WIDTHS = [(4, 4), (3, 3), (2, 2)]


@dataclass(frozen=True)
class Row:
    """Microseconds of one shape and pair of widths."""

    sequences: int
    tokens: int
    bits: tuple[int, int]
    contiguous_us: float
    lengths_us: float
    rows_us: float
    listed_us: float
    plan_us: float
    write_us: float
    extend_us: float


def states(*lead: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values [*lead, D]."""
    keys, values = torch.randn(2, *lead, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    return keys, values


def filled(sequences: int, tokens: int, bits: tuple[int, int]) -> PagedAttention:
    """Sequences of `tokens` tokens each, with balanced channels, and capacity for 384 more."""
    paged = PagedAttention(
        sequences * (tokens // 128 + 3),
        sequences,
        query_heads=GROUP * KV_HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        bits=bits,
        max_tokens=tokens + 384,
        device="cuda",
    )
    for _ in range(sequences):
        moment = torch.rand(KV_HEADS, HEAD_DIM, device="cuda") + 0.1
        paged.add(*states(KV_HEADS, tokens), query_moment=moment)
    return paged


def contiguous(paged: PagedAttention, plan: PagedPlan) -> list[Segment]:
    """The same tokens without a table and without lengths."""
    first, middle, last = paged.pool.segments(plan, 0)
    assert isinstance(first, DenseSegment) and isinstance(middle, PackedSegment)
    assert isinstance(last, DenseSegment) and middle.table is not None
    used, rows = int(plan.window[0, 0]), middle.table[:, :, : len(paged.blocks(0))].long()
    sides = [
        PackedSide(side.codec, {name: plane[rows] for name, plane in side.planes.items()}, side.transform)
        for side in (middle.keys, middle.values)
    ]
    tails = [tail[:, :, :used].contiguous() for tail in (last.keys, last.values)]
    return [DenseSegment(first.keys, first.values), PackedSegment(sides[0], sides[1]), DenseSegment(*tails)]


def microseconds(call: object) -> float:
    """Median time of one call in a CUDA graph."""
    return float(do_bench_cudagraph(call, rep=50, return_mode="median")) * 1000


def measure(sequences: int, tokens: int, bits: tuple[int, int]) -> Row:
    """Compare and time one shape and pair of widths."""
    paged = filled(sequences, tokens, bits)
    query = torch.randn(sequences, GROUP * KV_HEADS, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    plan, order = paged.plan(), list(range(sequences))[::-1]
    if sequences == 1:  # a list of every row in order is no list
        listed = paged.pool.plan(
            paged.block_tables, paged.context_lens, paged.page_counts, torch.zeros(1, device="cuda").long()
        )
    else:
        listed = paged.plan(order)
    plain = contiguous(paged, plan)
    visibility = Visibility(1, sum(segment.tokens for segment in plain))
    expected = attend(query, plain, visibility, scaling=HEAD_DIM**-0.5).float()
    first, _, last = paged.pool.segments(plan, 0)
    counted = [first, replace(plain[1], lengths=plan.packed), last]
    visibility = Visibility(1, sum(segment.tokens for segment in counted))
    for got in (
        attend(query, counted, visibility, scaling=HEAD_DIM**-0.5),
        paged.attend(query, plan),
        paged.attend(query[order], listed)[order],
    ):
        assert (got.float() - expected).norm() < 1e-2 * expected.norm(), "outputs differ"
    new = states(sequences, KV_HEADS, 1)
    for _ in range(128):  # kernels are compiled when the first pages are packed
        paged.extend()
    times = [
        microseconds(call)
        for call in (
            lambda: attend(query, plain, visibility, scaling=HEAD_DIM**-0.5),
            lambda: attend(query, counted, visibility, scaling=HEAD_DIM**-0.5),
            lambda: paged.attend(query, plan),
            lambda: paged.attend(query, listed),
            lambda: paged.plan(),
            lambda: paged.write(*new, plan),
        )
    ]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(128):
        paged.extend()
    torch.cuda.synchronize()
    extend_us = (time.perf_counter() - start) / 128 * 1e6
    return Row(sequences, tokens, bits, *times, extend_us)


def show(rows: list[Row]) -> None:
    """Print the table."""
    device = torch.cuda.get_device_name(0)
    table = Table(title=f"{device}, torch {torch.__version__}, triton {triton.__version__}; microseconds")
    for name in (
        "sequences",
        "tokens",
        "bits",
        "contiguous",
        "lengths",
        "rows",
        "listed",
        "plan",
        "write",
        "extend",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        ratios = [f"{us:.1f} ({us / row.lengths_us:.2f}x)" for us in (row.rows_us, row.listed_us)]
        rest = [f"{us:.1f}" for us in (row.plan_us, row.write_us, row.extend_us)]
        bits = f"{row.bits[0]}/{row.bits[1]}"
        table.add_row(
            str(row.sequences),
            str(row.tokens),
            bits,
            f"{row.contiguous_us:.1f}",
            f"{row.lengths_us:.1f}",
            *ratios,
            *rest,
        )
    Console(width=120).print(table)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/paged.py needs a CUDA device; there is none here")
    rows = []
    for sequences, tokens in SHAPES:
        for bits in WIDTHS:
            rows.append(measure(sequences, tokens, bits))
            torch.cuda.empty_cache()
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
