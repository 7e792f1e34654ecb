"""Packing in trellis codes on one GPU against packing in scalar codes and a copy of as many bytes.

    python benchmarks/trellis.py                  131072 tokens x 8 heads, head_dim 128, keys and values
    python benchmarks/trellis.py --head-dim 64
    python benchmarks/trellis.py --json out.json

First the kernel's codes are held against those of plain PyTorch on the same GPU, at every width and several
head dimensions: all of them should be the same. Then it times packing (`encode`, waiting for its checks
included), the search of codes in it, at 2 bits with other settings of the kernel too, and the same of scalar
codes. A copy of n bytes reads n / 2 and writes n / 2.
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

from quantpress.codecs import ScalarPages, TrellisPages
from quantpress.codecs.protocol import PageCodec
from quantpress.kernels.trellis.reference import nearest_path_reference
from quantpress.kernels.trellis.triton_search import SETTINGS, SearchSettings, nearest_path_triton
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from quantpress.quantization.trellis import trellis

WIDTHS = (1, 2, 3, 4)
HEAD_DIMS = (64, 128, 256)
LAYERS = 32
OTHERS = (
    SearchSettings(vectors=4, programs=12, registers=168),
    SearchSettings(vectors=4, programs=8, registers=168),
    SearchSettings(vectors=4, programs=20, registers=96),
    SearchSettings(vectors=8, programs=12, registers=168),
    SearchSettings(vectors=8, programs=8, registers=255),
    SearchSettings(vectors=2, programs=25, registers=80),
)
"""Settings of the kernel beside the ones that are used."""


@dataclass(frozen=True)
class Check:
    """How many of so many vectors get other codes from the kernel than from plain PyTorch."""

    bits: int
    head_dim: int
    vectors: int
    differing: int


@dataclass(frozen=True)
class Row:
    """Times of keys and values together at one width, in milliseconds."""

    bits: int
    encode_ms: float
    search_ms: float
    scalar_ms: float
    copy_ms: float

    @property
    def model_seconds(self) -> float:
        """All layers of a model, what scalar codes take not counted."""
        return LAYERS * (self.encode_ms - self.scalar_ms) / 1000


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    return float(triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median"))


def unit_vectors(count: int, dim: int) -> torch.Tensor:
    """Random ones."""
    x = torch.randn(count, dim, device="cuda")
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def check(bits: int, dim: int, count: int = 8193) -> Check:
    """Compare the kernel with plain PyTorch."""
    unit = unit_vectors(count, dim)
    unit[5] = 0
    mine, theirs = nearest_path_triton(unit, trellis(bits)), nearest_path_reference(unit, trellis(bits))
    return Check(bits, dim, count, int((mine != theirs).any(-1).sum()))


def measure(bits: int, tokens: int, heads: int, dim: int) -> Row:
    """Time one width."""
    lead = (1, heads, dim)
    transform = ChannelTransform(torch.randn(lead, device="cuda"), torch.rand(lead, device="cuda") + 0.5)
    times: dict[str, float] = {}
    moved = 0
    for role in ("key", "value"):
        x = torch.randn(1, heads, tokens, dim, device="cuda").bfloat16()
        change = transform if role == "key" else ChannelTransform()
        codecs: dict[str, PageCodec] = {
            "encode_ms": TrellisPages(dim, bits, role),
            "scalar_ms": ScalarPages(CodecSpec(dim, bits, role)),
        }
        for name, codec in codecs.items():
            times[name] = times.get(name, 0.0) + milliseconds(partial(codec.encode, x, change))
        moved += x.nbytes + sum(plane.nbytes for plane in codecs["encode_ms"].encode(x, change).values())
    source = torch.randn(moved // 8, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(partial(target.copy_, source))
    unit = unit_vectors(heads * tokens, dim)
    search = 2 * milliseconds(partial(nearest_path_triton, unit, trellis(bits)))
    return Row(bits, search_ms=search, copy_ms=copy, **times)


def sweep(tokens: int, heads: int, dim: int) -> list[dict[str, float]]:
    """Times of the search at 2 bits, keys and values, with other settings."""
    unit, two = unit_vectors(heads * tokens, dim), trellis(2)
    found = []
    for settings in (SETTINGS, *OTHERS):
        ms = 2 * milliseconds(partial(nearest_path_triton, unit, two, settings))
        found.append(asdict(settings) | {"search_ms": ms})
    return found


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Numbers in columns."""
    made = Table(title=title)
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def main() -> None:
    """Print the tables, and write them where --json says."""
    parser = argparse.ArgumentParser(description="Packing in trellis codes against scalar codes and a copy.")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    size = options.tokens, options.heads, options.head_dim
    shape = f"{options.tokens} tokens x {options.heads} heads, head_dim {options.head_dim}, keys and values"
    console = Console(width=130)
    checks = [check(bits, dim) for bits in WIDTHS for dim in HEAD_DIMS]
    cells = [[str(number) for number in asdict(one).values()] for one in checks]
    console.print(
        table(f"vectors with other codes than plain PyTorch's\n{machine}", list(asdict(checks[0])), cells)
    )
    rows = [measure(bits, *size) for bits in WIDTHS]
    columns = ["bits", "encode ms", "search ms", "scalar ms", "copy ms", f"s more in {LAYERS} layers"]
    cells = [[f"{number:.4g}" for number in (*asdict(row).values(), row.model_seconds)] for row in rows]
    console.print(table(f"packing, {shape}", columns, cells))
    settings = sweep(*size)
    cells = [[f"{number:.4g}" for number in one.values()] for one in settings]
    console.print(table("search at 2 bits by settings of the kernel", list(settings[0]), cells))
    if options.json:
        found = {"machine": machine, "shape": shape, "checks": [asdict(one) for one in checks]}
        found |= {"rows": [asdict(row) | {"model_seconds": row.model_seconds} for row in rows]}
        options.json.write_text(json.dumps(found | {"settings": settings}, indent=1))


if __name__ == "__main__":
    main()
