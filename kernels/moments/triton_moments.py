"""Launches the kernels of `triton_kernel.py`."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from quantpress.deferred import zero_flags
from quantpress.kernels.available import FUSED
from quantpress.kernels.moments.triton_kernel import (
    key_transform_kernel,
    not_finite_kernel,
    query_moment_kernel,
    token_moments_kernel,
)
from quantpress.kernels.quick import quick

TILE = 64
"""Tokens that are summed at a time."""

AT_ONCE = 1 << 15
"""Numbers of queries summed at a time, by so many warps: there are only as many programs as heads."""
WARPS = 16

MOST_SPLITS = 64
MOST_PROGRAMS = 2048
SCANNED = 4096
"""Numbers that a program looks at in one step for NaN and infinity."""

SCANNERS = 512
"""Most programs for each of two tensors."""


def _device(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _warps(dim: int) -> int:
    return 4 if dim <= 128 else 8


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_statistics(
    keys: Tensor, moment: Tensor | None, mean: bool, floor: float, order: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Statistics of keys, without waiting for the device.

    Args:
        keys: [B, Hkv, T, D], T at least 1.
        moment: [B, Hkv, D] float32, E[q_j^2], on the same device; None: no weight.
        mean: whether to subtract the mean.
        floor: as for `quantpress.quantization.transform.key_statistics`.
        order: whether the energy of the transformed keys is wanted, too.

    Returns:
        Mean, weight and energy, [B, Hkv, D] float32, or None where not asked for; and [B, Hkv, 3] float32: 1
        where statistics are not finite, else 0; the same of the moment; and the least moment.
    """
    keys = _rows(keys)
    batch, heads, tokens, dim = keys.shape
    splits = max(1, min(MOST_SPLITS, -(-tokens // (2 * TILE)), MOST_PROGRAMS // (batch * heads)))
    per = -(-tokens // (splits * TILE)) * TILE
    splits, channels = -(-tokens // per), _power(dim)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=keys.device)

    parts, found = new(batch * heads, splits, 2, channels), new(batch, heads, 3)
    centre, weight, energy = (
        new(batch, heads, dim) if wanted else None for wanted in (mean, moment is not None, order)
    )
    with _device(keys):
        quick(token_moments_kernel)[(splits, batch * heads)](
            keys,
            parts,
            *keys.stride()[:3],
            heads,
            tokens,
            per,
            D=dim,
            CHANNELS=channels,
            TILE=TILE,
            num_warps=_warps(dim),
            **FUSED,
        )
        quick(key_transform_kernel)[(batch * heads,)](
            parts,
            None if moment is None else moment.contiguous(),
            centre,
            weight,
            energy,
            found,
            tokens,
            per,
            splits,
            floor,
            D=dim,
            CHANNELS=channels,
            SPLITS=_power(splits),
            MEAN=mean,
            WEIGHT=moment is not None,
            ENERGY=order,
            num_warps=_warps(dim),
            **FUSED,
        )
    return centre, weight, energy, found


def launch_query_moment(
    queries: Tensor, kv_heads: int, computed: Tensor | None, actual: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    """As `quantpress.kernels.moments.query_moment`, without waiting for the device."""
    check = computed is not None and actual is not None
    queries = _rows(queries)
    computed, actual = (queries if one is None or not check else _rows(one) for one in (computed, actual))
    batch, query_heads, tokens, dim = queries.shape
    moment = torch.empty((batch, kv_heads, dim), dtype=torch.float32, device=queries.device)
    agree = zero_flags(1, queries.device)
    with _device(queries):
        quick(query_moment_kernel)[(batch * kv_heads,)](
            queries,
            computed,
            actual,
            moment,
            agree,
            *queries.stride()[:3],
            *computed.stride()[:3],
            *actual.stride()[:3],
            kv_heads,
            batch * kv_heads,
            query_heads // kv_heads,
            tokens,
            actual.shape[2],
            tolerance,
            D=dim,
            CHANNELS=_power(dim),
            TILE=TILE,
            ROWS=AT_ONCE // _power(dim),
            CHECK=check,
            num_warps=WARPS,
            **FUSED,
        )
    return moment, agree if check else None


def launch_not_finite(first: Tensor, second: Tensor) -> Tensor:
    """Whether two contiguous tensors of one dtype hold NaN or infinity: [2] int32, not 0 where they do."""
    flag = zero_flags(2, first.device)
    programs = min(SCANNERS, -(-max(first.numel(), second.numel(), 1) // SCANNED))
    with _device(first):
        quick(not_finite_kernel)[(programs, 2)](
            first, second, flag, first.numel(), second.numel(), BLOCK=SCANNED, num_warps=8, **FUSED
        )
    return flag
