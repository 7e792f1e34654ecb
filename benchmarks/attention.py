"""Decode attention over packed codes against torch's attention over 16-bit keys and values, in one run.

    python benchmarks/attention.py            the shapes of the README
    python benchmarks/attention.py --full     every combination of batch, length, head_dim, group and width
    python benchmarks/attention.py --json out.json

Both sides are replayed as CUDA graphs. The time is of the whole call: preparing the query, packed tokens,
4 sinks and 128 recent tokens in 16 bits, and the merge. The baseline is the fastest of torch's backends.
Correctness is checked first, against float64 attention on the decoded cache.
"""

import argparse
import itertools
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantpress.codecs.spec import CodecSpec
from quantpress.codecs.transform import ChannelTransform, key_statistics
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend
from quantpress.kernels.page_codec import ScalarPages

WIDTHS = [(4, 4), (3, 3), (2, 2), (4, 2), (3, 2)]
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SINKS, RECENT = 4, 128


@dataclass(frozen=True)
class Shape:
    """One row of the table, without the widths."""

    batch: int
    kv_heads: int
    group: int
    tokens: int
    head_dim: int


@dataclass(frozen=True)
class Row:
    """What was measured."""

    shape: Shape
    key_bits: int
    value_bits: int
    packed_us: float
    dense_us: float
    ratio: float
    bytes: int
    terabytes_per_s: float
    error: float


def microseconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Median time of one call, from replays of a CUDA graph of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    median = triton.testing.do_bench(graph.replay, warmup=20, rep=100, return_mode="median")
    return float(median) * 1000 / repeats


def baseline(shape: Shape) -> float:
    """Microseconds of the fastest of torch's attention backends on bfloat16 keys and values."""
    query, keys, values = (
        torch.randn(shape.batch, heads, tokens, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        for heads, tokens in (
            (shape.kv_heads * shape.group, 1),
            (shape.kv_heads, shape.tokens),
            (shape.kv_heads, shape.tokens),
        )
    )

    def call() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, enable_gqa=shape.group > 1
        )

    times = []
    warnings.simplefilter("ignore")  # torch explains at length why a backend does not take a shape
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                times.append(microseconds(call))
        except RuntimeError:
            continue  # this backend does not take this shape
    return min(times)


def packed(shape: Shape, key_bits: int, value_bits: int) -> list[Segment]:
    """Random tokens: sinks, packed pages, recent tokens; about `shape.tokens` in all."""
    pages = (shape.tokens - SINKS - RECENT) // 128 * 128
    sides = []
    for bits, role in ((key_bits, "key"), (value_bits, "value")):
        codec = ScalarPages(CodecSpec(head_dim=shape.head_dim, bits=bits, role=role))
        states = torch.randn(
            shape.batch, shape.kv_heads, pages, shape.head_dim, device="cuda", dtype=torch.bfloat16
        )
        moment = torch.rand(shape.batch, shape.kv_heads, shape.head_dim, device="cuda") + 0.1
        transform = key_statistics(states, moment, codec.groups) if role == "key" else ChannelTransform()
        sides.append(PackedSide(codec, codec.encode(states, transform), transform))
    tail = [
        torch.randn(shape.batch, shape.kv_heads, n, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        for n in (SINKS, shape.tokens - SINKS - pages)
    ]
    return [DenseSegment(tail[0], tail[0]), PackedSegment(*sides), DenseSegment(tail[1], tail[1])]


def exact(query: torch.Tensor, segments: list[Segment], group: int) -> torch.Tensor:
    """float64 attention on the decoded tokens, head by head."""
    keys, values = [], []
    for segment in segments:
        if isinstance(segment, DenseSegment):
            keys.append(segment.keys)
            values.append(segment.values)
        else:
            for side, into in ((segment.keys, keys), (segment.values, values)):
                into.append(side.codec.decode(side.planes, side.transform, torch.float32))
    outputs = []
    for head in range(keys[0].shape[1]):
        k = torch.cat([part[:, head].double() for part in keys], dim=1)
        v = torch.cat([part[:, head].double() for part in values], dim=1)
        q = query[:, head * group : (head + 1) * group, 0].double()
        outputs.append(torch.softmax(q @ k.transpose(1, 2) * query.shape[-1] ** -0.5, -1) @ v)
    return torch.cat(outputs, dim=1).unsqueeze(2)


def measure(shape: Shape, key_bits: int, value_bits: int, dense_us: float) -> Row:
    """Check and time one shape and pair of widths."""
    segments = packed(shape, key_bits, value_bits)
    query = torch.randn(
        shape.batch, shape.kv_heads * shape.group, 1, shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    visibility = Visibility(1, shape.tokens)
    scaling = shape.head_dim**-0.5
    got = attend(query, segments, visibility, scaling=scaling).double()
    expected = exact(query, segments, shape.group)
    error = float((got - expected).norm() / expected.norm())
    time = microseconds(lambda: attend(query, segments, visibility, scaling=scaling))
    pages = segments[1]
    assert isinstance(pages, PackedSegment)
    planes = [plane for side in (pages.keys, pages.values) for plane in side.planes.values()]
    tails = [t for s in segments if isinstance(s, DenseSegment) for t in (s.keys, s.values)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in planes + tails)
    return Row(shape, key_bits, value_bits, time, dense_us, dense_us / time, size, size / time / 1e6, error)


def show(rows: list[Row]) -> None:
    """Print the table."""
    device = torch.cuda.get_device_properties(0)
    table = Table(title=f"{device.name}, torch {torch.__version__}, triton {triton.__version__}")
    for name in (
        "B",
        "Hq",
        "Hkv",
        "d",
        "N",
        "K/V bits",
        "bf16 us",
        "packed us",
        "ratio",
        "MiB",
        "TB/s",
        "error",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        shape = row.shape
        table.add_row(
            *(str(n) for n in (shape.batch, shape.kv_heads * shape.group, shape.kv_heads, shape.head_dim)),
            str(shape.tokens),
            f"{row.key_bits}/{row.value_bits}",
            f"{row.dense_us:.1f}",
            f"{row.packed_us:.1f}",
            f"{row.ratio:.2f}x",
            f"{row.bytes / 2**20:.1f}",
            f"{row.terabytes_per_s:.2f}",
            f"{row.error:.1e}",
        )
    Console(width=110).print(table)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py needs a CUDA device; there is none here")
    shapes = [Shape(1, 8, 4, tokens, 128) for tokens in (8192, 32768, 131072)]
    if arguments.full:
        every = itertools.product((1, 8), (1, 4, 8), (8192, 32768, 131072), (64, 128, 256))
        shapes = [Shape(batch, 8, group, tokens, dim) for batch, group, tokens, dim in every]
    rows = []
    for shape in shapes:
        dense_us = baseline(shape)
        for key_bits, value_bits in WIDTHS:
            rows.append(measure(shape, key_bits, value_bits, dense_us))
        torch.cuda.empty_cache()
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
