"""Attention over layers whose KV heads have codecs of their own: one group of heads after the other.

Each group is read as a layer of fewer heads, by the same kernels, in as many launches as such a layer takes.
Its pages are read where they lie. Queries and 16-bit tokens are copied where its heads are no neighbours.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from quantpress.codecs.heads import Heads, join_heads, take_heads
from quantpress.kernels import attend as kernels
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility


def attend(
    query: torch.Tensor,
    segments: Sequence[Segment],
    visibility: Visibility,
    *,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """As `quantpress.kernels.attend.attend`, group by group where a codec has groups of heads.

    Args:
        query: [B, Hq, Tq, D].
        segments: the tokens in order, without page tables where a codec has groups of heads.
        visibility: which tokens each query token sees.
        sinks: [Hq], as there.
        **options: `scaling` and `softcap`, as there.

    Returns:
        [B, Hq, Tq, Dv] in the query's dtype.
    """
    packed = [one.keys.codec for one in segments if isinstance(one, PackedSegment)]
    groups = next((codec.heads for codec in packed if codec.heads), ())
    if not groups:
        return kernels.attend(query, segments, visibility, sinks=sinks, **options)
    shared = query.shape[1] // sum(map(len, groups))
    own_queries = [tuple(head * shared + n for head in heads for n in range(shared)) for heads in groups]
    parts = [
        kernels.attend(
            take_heads(query, queries),
            [_of_heads(one, heads) for one in segments],
            _seen_by(visibility, heads, queries),
            sinks=None if sinks is None else take_heads(sinks[None], queries)[0],
            **options,
        )
        for heads, queries in zip(groups, own_queries, strict=True)
    ]
    return join_heads(parts, own_queries)


def _of_heads(segment: Segment, heads: Heads) -> Segment:
    """The tokens of some KV heads."""
    lengths, starts = (
        None if one is None else take_heads(one, heads) for one in (segment.lengths, segment.starts)
    )
    if isinstance(segment, DenseSegment):
        own = [take_heads(states, heads) for states in (segment.keys, segment.values)]
        return DenseSegment(own[0], own[1], lengths, starts)
    keys, values = (
        PackedSide(*side.codec.of_heads(side.planes, side.transform, heads))
        for side in (segment.keys, segment.values)
    )
    return PackedSegment(keys, values, lengths=lengths, starts=starts)


def _seen_by(visibility: Visibility, heads: Heads, queries: Heads) -> Visibility:
    """What the query heads of some KV heads see."""
    mask, dropped = visibility.mask, visibility.dropped
    return replace(
        visibility,
        mask=mask if mask is None or mask.shape[1] == 1 else take_heads(mask, queries),
        dropped=None if dropped is None else take_heads(dropped, heads),
    )
