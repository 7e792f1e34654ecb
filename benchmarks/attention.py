"""Decode attention over packed codes against attention over 16-bit and over FP8 keys and values, in one run.

    python benchmarks/attention.py            the shapes of the first table of docs/speed.md
    python benchmarks/attention.py --full     every combination of batch, length, head_dim, group and width
    python benchmarks/attention.py --paged    pages read through a table, and heads of different lengths
    python benchmarks/attention.py --full --json docs/results/attention_h200.json    a stopped run goes on

All sides are replayed as CUDA graphs, over several caches in turn, as the layers of a model have them; a
single short cache would stay in the GPU's L2 cache. The time is that of the whole call: preparing the query,
packed tokens, 4 sinks and 128 recent tokens in 16 bits, and the merge. The baseline in 16 bits is the fastest
of torch's backends. That in 8 bits is the fastest way of fp8_attention.py; its name and error stand below the
table. Correctness is checked first, against float64 attention on the decoded cache of the first and the last
head.
"""

import argparse
import itertools
import sys
import warnings
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))  # a Python with PYTHONSAFEPATH does not look beside a script

from attention_rows import Row, Shape, read, results, show
from fp8_attention import Measured, baselines
from graph_times import caches, microseconds

from quantpress.codecs.scalar import ScalarPages
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, key_statistics

LAYOUTS = ("contiguous", "table", "uneven")
"""Pages in a row; shuffled pages read by a table; the same with heads of 0.25 to 1.75 times the length."""

WIDTHS = [(4, 4), (3, 3), (2, 2), (4, 2), (3, 2)]
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SINKS, RECENT = 4, 128
ENCODED = 61
"""Pages of each head that get their own random numbers; they are repeated to fill the rest. Programs step by
multiples of 64 pages, so a prime shows one that reads the wrong page."""


def baseline(shape: Shape) -> float:
    """Microseconds of the fastest of torch's attention backends on bfloat16 keys and values."""

    def states(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(shape.batch, heads, tokens, shape.head_dim, device="cuda", dtype=torch.bfloat16)

    def attended(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, enable_gqa=shape.group > 1
        )

    query, first = states(shape.kv_heads * shape.group, 1), states(shape.kv_heads, shape.tokens)
    both = [first] + [states(shape.kv_heads, shape.tokens) for _ in range(2 * caches(2 * first.nbytes) - 1)]
    calls = [partial(attended, query, *pair) for pair in zip(both[::2], both[1::2], strict=True)]
    times = []
    warnings.simplefilter("ignore")  # torch explains at length why a backend does not take a shape
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend):
                times.append(microseconds(*calls))
        except RuntimeError:
            continue  # this backend does not take this shape
    return min(times)


def page_count(shape: Shape) -> int:
    """Packed pages of each head."""
    return (shape.tokens - SINKS - RECENT) // 128


@lru_cache(maxsize=len(WIDTHS) + 1)
def packed_side(shape: Shape, role: str, bits: int) -> PackedSide:
    """Random keys or values: `ENCODED` pages of each head are encoded, and repeated as often as needed."""
    pages = page_count(shape)
    codec = ScalarPages(CodecSpec(head_dim=shape.head_dim, bits=bits, role=role))
    lead = (shape.batch, shape.kv_heads)
    states = torch.randn(
        *lead, min(pages, ENCODED) * 128, shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    moment = torch.rand(*lead, shape.head_dim, device="cuda") + 0.1
    transform = key_statistics(states, moment, codec.groups) if role == "key" else ChannelTransform()
    planes = codec.encode(states, transform)
    page = torch.arange(pages, device="cuda") % ENCODED
    return PackedSide(codec, {name: plane[:, :, page] for name, plane in planes.items()}, transform)


def packed(shape: Shape, key_bits: int, value_bits: int) -> list[Segment]:
    """Random tokens: sinks, packed pages, recent tokens; about `shape.tokens` in all for each head."""
    tail = [
        torch.randn(shape.batch, shape.kv_heads, n, shape.head_dim, device="cuda", dtype=torch.bfloat16)
        for n in (SINKS, shape.tokens - SINKS - page_count(shape) * 128)
    ]
    middle = PackedSegment(packed_side(shape, "key", key_bits), packed_side(shape, "value", value_bits))
    if shape.layout != "contiguous":
        middle = by_table(middle, uneven=shape.layout == "uneven")
    return [DenseSegment(tail[0], tail[0]), middle, DenseSegment(tail[1], tail[1])]


def by_table(pages: PackedSegment, uneven: bool) -> PackedSegment:
    """The same pages shuffled into a pool; if uneven, dealt to the heads anew, tokens in use to the right."""
    shape = next(iter(pages.keys.planes.values())).shape[:3]
    total = shape[0] * shape[1] * shape[2]
    share = torch.full(shape[:2], float(shape[2]))
    if uneven:
        share = share * torch.linspace(0.25, 1.75, shape[1])
    held = share.floor().int()
    rows, table = torch.randperm(total).int(), torch.zeros(*shape[:2], int(held.max()), dtype=torch.int32)
    inside = torch.arange(table.shape[2]) < held.unsqueeze(-1)
    table[inside] = rows[: int(held.sum())]
    starts = torch.randint(0, 128, shape[:2], dtype=torch.int32) if uneven else torch.zeros_like(held)
    sides = []
    for side in (pages.keys, pages.values):
        planes = {name: plane.flatten(0, 2) for name, plane in side.planes.items()}
        sides.append(PackedSide(side.codec, planes, side.transform))
    lengths, starts, table = ((held * 128 - starts).cuda(), starts.cuda(), table.cuda())
    return PackedSegment(*sides, lengths, table, starts if uneven else None)


def exact(query: torch.Tensor, segments: list[Segment], group: int, head: int) -> torch.Tensor:
    """float64 attention on the decoded tokens of one KV head: [B, G, 1, D]."""
    first, middle, last = segments
    assert isinstance(middle, PackedSegment)
    outputs = []
    for entry in range(query.shape[0]):
        parts = []
        for side, dense in zip(middle.narrow(0, middle.pages), ("keys", "values"), strict=True):
            planes = {name: plane[entry, head][None, None] for name, plane in side.planes.items()}
            at = slice(entry, entry + 1), slice(head, head + 1)
            transform = side.transform.map(lambda part: part[at])  # noqa: B023
            decoded = side.codec.decode(planes, transform, torch.float32)[0, 0].double()
            start = 0 if middle.starts is None else int(middle.starts[entry, head])
            count = len(decoded) if middle.lengths is None else int(middle.lengths[entry, head])
            ends = [getattr(segment, dense)[entry, head].double() for segment in (first, last)]
            parts.append(torch.cat([ends[0], decoded[start : start + count], ends[1]]))
        q = query[entry, head * group : (head + 1) * group, 0].double()
        outputs.append(torch.softmax(q @ parts[0].T * query.shape[-1] ** -0.5, -1) @ parts[1])
    return torch.stack(outputs).unsqueeze(2)


def tensors(segment: Segment) -> list[torch.Tensor]:
    """The tensors that are read: codes and scales, or tokens in 16 bits."""
    if isinstance(segment, PackedSegment):
        return [plane for side in (segment.keys, segment.values) for plane in side.planes.values()]
    return [segment.keys, segment.values]


def copied(segment: Segment) -> Segment:
    """A copy of the same tokens."""
    if isinstance(segment, PackedSegment):
        keys, values = (
            replace(side, planes={name: plane.clone() for name, plane in side.planes.items()})
            for side in (segment.keys, segment.values)
        )
        return replace(segment, keys=keys, values=values)
    return replace(segment, keys=segment.keys.clone(), values=segment.values.clone())


def fp8_baseline(shape: Shape) -> Measured | None:
    """The fastest attention over an FP8 cache, or None on a GPU without FP8."""
    found, failed = baselines(shape.batch, shape.kv_heads, shape.group, shape.tokens, shape.head_dim)
    for reason in failed:
        print(f"fp8, {shape.batch} x {shape.tokens} tokens: {reason}", file=sys.stderr)
    return found[0] if found else None


def measure(shape: Shape, key_bits: int, value_bits: int, dense_us: float, fp8: Measured | None) -> Row:
    """Check and time one shape and pair of widths."""
    segments = packed(shape, key_bits, value_bits)
    query = torch.randn(
        shape.batch, shape.kv_heads * shape.group, 1, shape.head_dim, device="cuda", dtype=torch.bfloat16
    )
    visibility = Visibility(1, sum(segment.tokens for segment in segments))
    scaling = shape.head_dim**-0.5
    got = attend(query, segments, visibility, scaling=scaling).double()
    error = 0.0
    for head in (0, shape.kv_heads - 1):
        expected = exact(query, segments, shape.group, head)
        part = got[:, head * shape.group : (head + 1) * shape.group]
        error = max(error, float((part - expected).norm() / expected.norm()))
    size = sum(tensor.nbytes for segment in segments for tensor in tensors(segment))
    several = [segments] + [[*map(copied, segments)] for _ in range(caches(size) - 1)]
    time = microseconds(*(partial(attend, query, one, visibility, scaling=scaling) for one in several))
    return Row(shape, key_bits, value_bits, time, size, error, dense_us, fp8)


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--paged", action="store_true", help="pages in a row against pages by table")
    parser.add_argument("--batch", type=int, help="only this batch size")
    parser.add_argument("--head-dim", type=int, help="only this head_dim")
    parser.add_argument("--kv-heads", type=int, default=8, help="KV heads, of four query heads; default 8")
    parser.add_argument(
        "--json", type=Path, help="write each row here as it is measured; rows there are kept"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/attention.py needs a CUDA device; there is none here")
    many = Shape(64, arguments.kv_heads, 4, 4096, 128)
    shapes = [Shape(1, arguments.kv_heads, 4, tokens, 128) for tokens in (8192, 32768, 131072)] + [many]
    if arguments.full:
        every = itertools.product((1, 8), (1, 4, 8), (8192, 32768, 131072), (64, 128, 256))
        shapes = [Shape(batch, 8, group, tokens, dim) for batch, group, tokens, dim in every] + [many]
    if arguments.paged:
        few = ((1, 8192), (1, 131072), (8, 32768))
        shapes = [Shape(batch, 8, 4, tokens, 128, layout) for batch, tokens in few for layout in LAYOUTS]
    shapes = [
        shape
        for shape in shapes
        if shape.batch == (arguments.batch or shape.batch)
        and shape.head_dim == (arguments.head_dim or shape.head_dim)
    ]
    rows = read(arguments.json)
    for shape in track(shapes, console=Console(stderr=True)):
        if any(row.shape == shape for row in rows):
            continue
        dense_us, fp8 = baseline(shape), fp8_baseline(shape)
        rows += [measure(shape, key_bits, value_bits, dense_us, fp8) for key_bits, value_bits in WIDTHS]
        packed_side.cache_clear()
        torch.cuda.empty_cache()
        if arguments.json:
            arguments.json.write_text(results(rows))
    show(rows)


if __name__ == "__main__":
    main()
