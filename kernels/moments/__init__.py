"""Statistics of the keys and queries of a prefill: in a few launches on a GPU, else in plain PyTorch.

A layer is packed between two forwards, when nothing but the host's time counts: each operation of PyTorch
costs as much there as a launch of a kernel that does the work of twenty.

reference.py            plain PyTorch, beside `quantpress.quantization.transform`
triton_kernel.py        the kernels
triton_moments.py       launches them
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantpress.deferred import judge
from quantpress.kernels.available import runs_triton
from quantpress.kernels.moments.reference import not_finite_reference, query_moment_reference
from quantpress.quantization import moments, transform
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.numerics import in_named_dtypes
from quantpress.quantization.transform import ChannelTransform, channel_order

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_CHANNELS = 256


@in_named_dtypes
def key_statistics(
    keys: Tensor,
    query_moment: Tensor | None,
    groups: Sequence[ChannelGroup],
    mean: bool = True,
    balance: bool = True,
    in_use: Tensor | None = None,
) -> ChannelTransform:
    """As `quantpress.quantization.transform.key_statistics`, on a GPU by kernels."""
    moment = query_moment if balance else None
    fits = keys.dim() == 4 and keys.shape[2] > 0 and keys.shape[3] <= MOST_CHANNELS and keys.dtype in DTYPES
    fits = fits and (moment is None or moment.shape == (*keys.shape[:2], keys.shape[3]))
    if in_use is not None or not fits or not runs_triton(keys.device):
        return transform.key_statistics(keys, query_moment, groups, mean, balance, in_use=in_use)
    from quantpress.kernels.moments.triton_moments import launch_statistics

    moment = None if moment is None else moment.to(keys.device, torch.float32)
    ordered = len(groups) > 1
    centre, weight, energy, found = launch_statistics(keys, moment, mean, transform.DEFAULT_FLOOR, ordered)
    judge(_check_statistics, found)
    return ChannelTransform(centre, weight, None if energy is None else channel_order(energy))


def _check_statistics(found: list[float]) -> None:
    """Refuse the statistics of [B, Hkv, 3]: whether keys, and moments, are not finite; the least moment."""
    for place, name in enumerate(("keys", "query_moment")):
        if any(found[place::3]):
            moments.refuse_not_finite(name)
    transform.check_least_moment(found[2::3])


@in_named_dtypes
def query_moment(
    queries: Tensor, kv_heads: int, computed: Tensor | None, actual: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    """E[q_j^2] over queries and the query heads of each KV head, if the keys computed with them are right.

    Args:
        queries: [B, Hq, W, D], after the rotary embedding.
        kv_heads: Hkv.
        computed: [B, Hkv, n, D], keys computed as the queries were; None: they are not compared.
        actual: the keys that they should be, of the same shape and dtype. Channels that are 0 do not count.
        tolerance: most |computed - actual| relative to |actual|, both over all numbers.

    Returns:
        [B, Hkv, D] float32, 0 where the keys are not right, and whether they are ([1] or [], not 0: yes; None
        where they were not compared).
    """
    if runs_triton(queries.device) and queries.dtype in DTYPES and queries.shape[-1] <= MOST_CHANNELS:
        from quantpress.kernels.moments.triton_moments import launch_query_moment

        return launch_query_moment(queries, kv_heads, computed, actual, tolerance)
    return query_moment_reference(queries, kv_heads, computed, actual, tolerance)


def not_finite(keys: Tensor, values: Tensor) -> Tensor:
    """Whether keys, and values, hold NaN or infinity: [2], not 0 where they do.

    Args:
        keys: [B, Hkv, T, D] floating.
        values: [B, Hkv, T, Dv], likewise.
    """
    plain = keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype
    if plain and keys.dtype in DTYPES and runs_triton(keys.device):
        from quantpress.kernels.moments.triton_moments import launch_not_finite

        return launch_not_finite(keys, values)
    return not_finite_reference(keys, values)
