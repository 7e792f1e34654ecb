"""Some of the KV heads of a tensor, and all of them again.

Heads are taken in runs of neighbours, as slices. A single run is a view, and nothing here needs an index on
the device, so that a CUDA graph may capture it.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from quantpress.quantization.transform import ChannelTransform

Heads = tuple[int, ...]
"""Indices of KV heads, ascending."""


def take_heads(x: Tensor, heads: Heads) -> Tensor:
    """The heads of x [B, H, ...]: [B, len(heads), ...], a view where they are neighbours."""
    parts = [x[:, start:stop] for start, stop in _runs(heads)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def take_planes(plane: Tensor, heads: Heads) -> Tensor:
    """The heads of a plane [B, H, P, ...], equally far apart over the whole batch, as kernels read it."""
    own = take_heads(plane, heads)
    even = own.shape[0] == 1 or own.stride(0) == own.shape[1] * own.stride(1)
    return own if even else own.contiguous()


def transform_of(transform: ChannelTransform, heads: Heads) -> ChannelTransform:
    """The channel transform of some heads, contiguous as kernels read it."""
    return transform.map(lambda part: take_heads(part, heads).contiguous())


def join_heads(parts: Sequence[Tensor], groups: Sequence[Heads]) -> Tensor:
    """Put heads together again.

    Args:
        parts: [B, heads of the group, ...], one for each group, of one dtype.
        groups: the heads of each; together they are 0 to H - 1.

    Returns:
        [B, H, ...], a new tensor.
    """
    like, count = parts[0], sum(map(len, groups))
    joined = like.new_empty((like.shape[0], count, *like.shape[2:]))
    for part, heads in zip(parts, groups, strict=True):
        done = 0
        for start, stop in _runs(heads):
            joined[:, start:stop] = part[:, done : done + stop - start]
            done += stop - start
    return joined


def _runs(heads: Heads) -> list[tuple[int, int]]:
    """Runs of neighbours, as (first, one past the last)."""
    breaks = [n + 1 for n, (one, other) in enumerate(pairwise(heads)) if other != one + 1]
    return [(heads[low], heads[high - 1] + 1) for low, high in pairwise((0, *breaks, len(heads)))]
