"""Launches the FP8 kernels of fp8_kernel.py, with the settings that are tried on each shape."""

from dataclasses import dataclass

import torch
import triton
from fp8_kernel import fp8_merge_kernel, fp8_split_kernel

LOG2_E = 1.4426950408889634
LEAST_CAPABILITY, CHAINS = (8, 9), (9, 0)
"""Of GPUs with instructions for e4m3; of those whose kernels may start before the one before has ended."""

MOST_SPLITS = 256
START = 1
"""What a program takes before its first tile, in tiles."""


@dataclass(frozen=True)
class Settings:
    """Tokens of a tile, warps of a program, stages of its pipeline, programs a multiprocessor."""

    tile: int
    warps: int
    stages: int
    programs: int


SETTINGS = (
    Settings(32, 4, 4, 4),
    Settings(64, 4, 3, 2),
    Settings(64, 4, 3, 4),
    Settings(64, 4, 5, 3),
    Settings(128, 4, 2, 4),
    Settings(128, 4, 3, 3),
    Settings(128, 8, 3, 1),
    Settings(128, 8, 3, 2),
)


@dataclass(frozen=True)
class Fp8Cache:
    """Keys and values [B, Hkv, N, D], contiguous, in float8_e4m3fn, each with one scale."""

    keys: torch.Tensor
    values: torch.Tensor
    key_scale: float
    value_scale: float


def split_count(heads: int, tiles: int, programs: int) -> int:
    """Splits of each of `heads` of `tiles`, for the least time where `programs` run at a time.

    >>> split_count(heads=8, tiles=1024, programs=264)
    32
    """
    wanted = range(1, min(tiles, MOST_SPLITS) + 1)
    return min(wanted, key=lambda n: (START + -(-tiles // n)) * -(-heads * n // programs))


def attend_fp8(query: torch.Tensor, cache: Fp8Cache, settings: Settings, plain: bool = False) -> torch.Tensor:
    """Attention of one token.

    Args:
        query: [B, Hq, 1, D], contiguous.
        cache: of B batch entries and Hkv heads; Hq is a multiple of Hkv.
        settings: how the kernels are launched.
        plain: in float32, for Triton's interpreter.

    Returns:
        [B, Hq, 1, D] in the query's dtype.
    """
    batch, kv_heads, tokens, dim = cache.keys.shape
    heads, group = batch * kv_heads, query.shape[1] // kv_heads
    running, chained = 4, False
    if not plain:
        running = torch.cuda.get_device_properties(query.device).multi_processor_count * settings.programs
        chained = torch.cuda.get_device_capability(query.device) >= CHAINS
    splits = split_count(heads, -(-tokens // settings.tile), running)
    sums = query.new_empty(heads, splits, group, dim, dtype=torch.float32)
    most, total = (query.new_empty(heads, splits, group, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(query)
    fp8_split_kernel[(splits, heads)](
        query,
        cache.keys.view(torch.int16),
        cache.values.view(torch.int16),
        sums,
        most,
        total,
        cache.key_scale * dim**-0.5 * LOG2_E,
        tokens,
        splits,
        group,
        D=dim,
        ROWS=max(16, triton.next_power_of_2(group)),
        TILE=settings.tile,
        STAGES=settings.stages,
        CHAINED=chained,
        PLAIN=plain,
        num_warps=settings.warps,
        enable_fp_fusion=True,
    )
    channels = 32
    fp8_merge_kernel[(heads * group, dim // channels)](
        sums,
        most,
        total,
        out,
        cache.value_scale,
        splits,
        group,
        D=dim,
        SPLITS=triton.next_power_of_2(splits),
        CHANNELS=channels,
        CHAINED=chained,
        num_warps=4,
        enable_fp_fusion=True,
        **({"launch_pdl": True} if chained else {}),
    )
    return out
