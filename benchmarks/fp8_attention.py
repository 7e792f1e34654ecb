"""Decode attention over an FP8 (e4m3) cache, by every way that this machine has: the baseline in 8 bits.

    python benchmarks/fp8_attention.py            every way and its time, for the shapes of attention.py
    python benchmarks/fp8_attention.py --shape 64 8 4 4096 128    batch, KV heads, group, tokens, head_dim

The ways are a Triton kernel of our own under several settings (fp8_kernel.py) and, where vLLM can be imported
on a Hopper GPU, its FlashAttention 3: over one buffer and over pages as vLLM lays them out, with the splits
that it chooses and with others. Keys and values have one scale each. FlashAttention takes the query in FP8
too; rounding it and planning the splits are not in its time. attention.py takes the fastest way. Errors
are relative to float64 attention on what the cache holds, for the first and the last head.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # a Python with PYTHONSAFEPATH does not look beside a script

from fp8_triton import LEAST_CAPABILITY, SETTINGS, Fp8Cache, attend_fp8
from graph_times import caches, microseconds
from rich.console import Console
from rich.table import Table

Call = Callable[[], torch.Tensor]
Way = Callable[[torch.Tensor, Fp8Cache], Call]

FP8 = torch.float8_e4m3fn
PAGES = (None, 16, 64, 128, 256)
"""Tokens of a page; None: one buffer without a table."""

SPLITS = (0, 16, 32)
"""Splits that FlashAttention is told to make; 0: it chooses."""

WRONG = 0.1
"""A way with a larger error has not computed attention."""


@dataclass(frozen=True)
class Measured:
    """One way: its name, the microseconds of a call, its error."""

    name: str
    us: float
    error: float


def in_fp8(states: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Numbers in FP8 and the one scale that brings the largest to the largest of FP8."""
    scale = float(states.abs().max()) / torch.finfo(FP8).max
    return (states.float() / scale).to(FP8), scale


def random_cache(batch: int, kv_heads: int, tokens: int, head_dim: int, device: str = "cuda") -> Fp8Cache:
    """Keys and values from a normal distribution."""
    shape = batch, kv_heads, tokens, head_dim
    (keys, key_scale), (values, value_scale) = (
        in_fp8(torch.randn(shape, device=device, dtype=torch.bfloat16)) for _ in range(2)
    )
    return Fp8Cache(keys, values, key_scale, value_scale)


def exact(query: torch.Tensor, cache: Fp8Cache, head: int) -> torch.Tensor:
    """float64 attention of one KV head on what the cache holds: [B, G, 1, D]."""
    group = query.shape[1] // cache.keys.shape[1]
    outputs = []
    for entry in range(query.shape[0]):
        keys = cache.keys[entry, head].double() * cache.key_scale
        values = cache.values[entry, head].double() * cache.value_scale
        q = query[entry, head * group : (head + 1) * group, 0].double()
        outputs.append(torch.softmax(q @ keys.T * query.shape[-1] ** -0.5, -1) @ values)
    return torch.stack(outputs).unsqueeze(2)


@cache
def flash_attention() -> Any:
    """vLLM's FlashAttention; None, with the reason printed, where its version 3 cannot be had."""
    try:
        import vllm.vllm_flash_attn as found

        lacking = None if found.is_fa_version_supported(3) else found.fa_version_unsupported_reason(3)
    except Exception as error:  # vLLM raises what it likes where a part of it is missing, here and there
        lacking = f"{type(error).__name__}: {error}"
    if lacking is not None:
        print(f"FlashAttention 3 is left out: {lacking}", file=sys.stderr)
        return None
    return found


def flash(page: int | None, splits: int, query: torch.Tensor, cache: Fp8Cache) -> Call:
    """A call of FlashAttention 3; pages are a copy of the cache, keys and values side by side as in vLLM."""
    batch, kv_heads, tokens, dim = cache.keys.shape
    device, library = query.device, flash_attention()
    asked, query_scale = in_fp8(query.squeeze(2))
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    table = None
    if page is None:
        keys, values = cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
    else:
        both = torch.cat([cache.keys.view(torch.uint8), cache.values.view(torch.uint8)], -1)
        pages = both.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1).contiguous()
        keys, values = pages.view(FP8).transpose(1, 2).split(dim, -1)
        table = torch.arange(len(pages), dtype=torch.int32, device=device).view(batch, -1)
    scales = [
        torch.full((1,), scale, device=device).expand(batch, kv_heads)
        for scale in (query_scale, cache.key_scale, cache.value_scale)
    ]
    plan = library.get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=tokens,
        num_heads_q=query.shape[1],
        num_heads_kv=kv_heads,
        headdim=dim,
        cache_seqlens=lengths,
        qkv_dtype=FP8,
        cu_seqlens_q=starts,
        page_size=page,
        causal=True,
        num_splits=splits,
    )
    return partial(
        library.flash_attn_varlen_func,
        q=asked,
        k=keys,
        v=values,
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=tokens,
        seqused_k=lengths,
        causal=True,
        block_table=table,
        scheduler_metadata=plan,
        q_descale=scales[0],
        k_descale=scales[1],
        v_descale=scales[2],
        num_splits=splits,
        fa_version=3,
    )


def ways() -> Iterator[tuple[str, Way]]:
    """Every way, by name."""
    for one in SETTINGS:
        name = f"Triton, {one.tile} tokens, {one.warps} warps, {one.stages} stages, {one.programs} programs"
        yield name, lambda query, cache, one=one: partial(attend_fp8, query, cache, one)
    if flash_attention() is not None:
        for page in PAGES:
            place = "one buffer" if page is None else f"pages of {page}"
            for splits in SPLITS:
                name = f"FlashAttention 3, {place}, {splits or 'own'} splits"
                yield name, partial(flash, page, splits)


def baselines(
    batch: int, kv_heads: int, group: int, tokens: int, head_dim: int, device: str = "cuda"
) -> tuple[list[Measured], list[str]]:
    """Every way that works on this shape, fastest first, and why others do not; none on a GPU without FP8.

    All are timed for a short while, then the fastest again, as everything else is.
    """
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return [], []
    query = torch.randn(batch, kv_heads * group, 1, head_dim, device=device, dtype=torch.bfloat16)
    size = 2 * batch * kv_heads * tokens * head_dim
    several = [random_cache(batch, kv_heads, tokens, head_dim, device) for _ in range(caches(size))]
    first = several[0]
    expected = [(head, exact(query, first, head)) for head in (0, kv_heads - 1)]

    def error(got: torch.Tensor) -> float:
        heads = got.double().view(batch, kv_heads, group, 1, head_dim)
        return max(float((heads[:, head] - one).norm() / one.norm()) for head, one in expected)

    found, failed, calls = [], [], {}
    for name, way in ways():
        try:
            made = [way(query, one) for one in several]
            off = error(made[0]())
            if not off < WRONG:
                raise RuntimeError(f"error {off:.1e}")
            found.append(Measured(name, microseconds(*made, milliseconds=20), off))
        except Exception as reason:  # a library, or a setting too large for this GPU: the others are tried
            failed.append(f"{name}: {type(reason).__name__} {str(reason)[:100]}")
            continue
        if found[-1] == min(found, key=lambda one: one.us):
            calls = {name: made}
    found.sort(key=lambda one: one.us)
    if found:
        found[0] = Measured(found[0].name, microseconds(*calls[found[0].name]), found[0].error)
    return found, failed


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        type=int,
        nargs=5,
        action="append",
        metavar=("B", "HKV", "G", "N", "D"),
        help="batch, KV heads, query heads of each, tokens, head_dim; again for more shapes",
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/fp8_attention.py needs a CUDA device; there is none here")
    shapes = arguments.shape or [[1, 8, 4, 131072, 128], [1, 8, 4, 8192, 128], [64, 8, 4, 4096, 128]]
    for shape in shapes:
        found, failed = baselines(*shape)
        batch, kv_heads, group, tokens, head_dim = shape
        size = 2 * batch * kv_heads * tokens * head_dim
        title = (
            f"{torch.cuda.get_device_name()}: {batch} x {tokens} tokens, {kv_heads * group}/{kv_heads} heads"
        )
        table = Table(title=f"{title}, head_dim {head_dim}, {size / 2**20:.0f} MiB")
        for name in ("way", "us", "TB/s", "error"):
            table.add_column(name, justify="left" if name == "way" else "right")
        for one in found:
            table.add_row(one.name, f"{one.us:.1f}", f"{size / one.us / 1e6:.2f}", f"{one.error:.1e}")
        Console(width=110).print(table)
        print(*failed, sep="\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
