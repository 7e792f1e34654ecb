"""Encoding of keys and values into pages against a copy of as many bytes on the same device, in one run.

    python benchmarks/encode.py                  131072 tokens x 8 heads, head_dim 128, keys and values
    python benchmarks/encode.py --head-dim 64
    python benchmarks/encode.py --json out.json

Keys lose their mean and have their channels balanced, as in a cache; values are packed as they are. Times are
of CUDA-graph replays, without the one wait for the check that everything is finite. A copy of n bytes reads
n / 2 and writes n / 2. Some pages are checked against the CPU first.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.table import Table

from quantpress.kernels.dequantize import decode_pages
from quantpress.kernels.encode.hopper_encode import covers
from quantpress.kernels.encode.reference import encode_pages_reference
from quantpress.kernels.encode.triton_encode import EncodeSettings, launch_encode
from quantpress.kernels.layout import PAGE_TOKENS, unpack_pages
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

WIDTHS = [(4, 4), (3, 3), (2, 2)]
CHECKED_PAGES = 8


@dataclass(frozen=True)
class Row:
    """What was measured at one pair of widths; times of keys, of values and of the copy in microseconds.

    `hopper`: the kernel for Hopper encoded both sides.
    """

    key_bits: int
    value_bits: int
    key_us: float
    value_us: float
    copy_us: float
    bytes: int
    decode_us: float
    ties: int
    hopper: bool

    @property
    def encode_us(self) -> float:
        return self.key_us + self.value_us

    @property
    def ratio(self) -> float:
        """Achieved bandwidth as a part of the copy's."""
        return self.copy_us / self.encode_us


def microseconds(call: Callable[[], object], repeats: int = 4) -> float:
    """Median time of one call, from replays of a CUDA graph of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    median = triton.testing.do_bench(graph.replay, warmup=20, rep=60, return_mode="median")
    return float(median) * 1000 / repeats


def ties(x: torch.Tensor, spec: CodecSpec, transform: ChannelTransform) -> int:
    """Codes of a few pages that differ from the CPU's, all of them by one level.

    Raises:
        RuntimeError: more differ than near ties can explain.
    """
    some = x[:, :, : CHECKED_PAGES * PAGE_TOKENS]
    got, _ = launch_encode(some, spec, transform)
    expected = encode_pages_reference(some.cpu(), spec, transform.map(lambda t: t.cpu()))
    group = spec.groups[0]
    codes = (unpack_pages(p["codes0"].cpu(), group.bits, group.channels, spec.role) for p in (got, expected))
    apart = torch.sub(*(c.int() for c in codes)).abs()
    if int(apart.max()) > 1 or float((apart > 0).float().mean()) > 1e-4:
        raise RuntimeError(
            f"{int((apart > 0).sum())} of {apart.numel()} codes differ, by up to {int(apart.max())}"
        )
    return int((apart > 0).sum())


def measure(
    tokens: int, heads: int, dim: int, key_bits: int, value_bits: int, settings: EncodeSettings | None = None
) -> Row:
    """Time one pair of widths on random bfloat16 keys and values."""
    lead = (1, heads, dim)
    keys, values = (torch.randn(1, heads, tokens, dim, device="cuda").bfloat16() for _ in range(2))
    weight = (torch.rand(lead, device="cuda") + 0.5).to(torch.bfloat16).float()  # as caches have it
    transform = ChannelTransform(torch.randn(lead, device="cuda"), weight)
    sides = [
        (keys, CodecSpec(dim, key_bits, "key"), transform),
        (values, CodecSpec(dim, value_bits, "value"), ChannelTransform()),
    ]
    differing = sum(ties(*side) for side in sides)
    times, moved, decode = [], keys.nbytes + values.nbytes, 0.0
    for x, spec, change in sides:
        planes, _ = launch_encode(x, spec, change, settings)
        moved += sum(plane.nbytes for plane in planes.values())
        times.append(microseconds(partial(launch_encode, x, spec, change, settings)))
        decode += microseconds(partial(decode_pages, planes, spec, change, torch.bfloat16))
    source = torch.randn(moved // 8, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds(lambda: target.copy_(source))
    hopper = settings is None and all(covers(*side) for side in sides)
    return Row(key_bits, value_bits, times[0], times[1], copy, moved, decode, differing, hopper)


def main() -> None:
    """Print the table, and write it where --json says."""
    parser = argparse.ArgumentParser(
        description="Encoding of keys and values against a copy of as many bytes."
    )
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [measure(options.tokens, options.heads, options.head_dim, *widths) for widths in WIDTHS]
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    shape = f"{options.tokens} tokens x {options.heads} heads, head_dim {options.head_dim}, bfloat16"
    table = Table(title=f"encode, {shape}\n{machine}")
    for title in (
        "bits K/V",
        "MB",
        "keys us",
        "values us",
        "encode TB/s",
        "copy us",
        "copy TB/s",
        "of copy",
        "decode us",
    ):
        table.add_column(title, justify="right")
    table.add_column("codes at ties", justify="right")
    table.add_column("kernel", justify="right")
    for row in rows:
        cells = [f"{row.bytes / 1e6:.0f}", f"{row.key_us:.0f}", f"{row.value_us:.0f}"]
        cells += [
            f"{row.bytes / row.encode_us / 1e6:.2f}",
            f"{row.copy_us:.0f}",
            f"{row.bytes / row.copy_us / 1e6:.2f}",
        ]
        cells += [f"{row.ratio:.0%}", f"{row.decode_us:.0f}", str(row.ties)]
        cells += ["Hopper" if row.hopper else "Triton"]
        table.add_row(f"{row.key_bits}/{row.value_bits}", *cells)
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1)
        )


if __name__ == "__main__":
    main()
