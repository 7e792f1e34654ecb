"""Run by `test_triton_attend.py` in Triton's interpreter: prints relative errors."""

import json
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

from quantpress.cache.attention import by_heads
from quantpress.codecs.head_groups import HeadGroups
from quantpress.kernels import attend as kernels
from quantpress.kernels.attend import (
    DenseSegment,
    PackedSegment,
    PackedSide,
    Segment,
    Visibility,
    triton_attend,
)
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.schedule import PageSchedule, launch_schedule, scheduled_programs
from quantpress.kernels.attend.triton_attend import attend_triton, supports
from quantpress.quantization.transform import ChannelTransform
from tests.kernels.attend.test_attend import (
    GROUP,
    KV_HEADS,
    dense,
    exact,
    in_use,
    limit_in_use,
    packed,
    pooled,
    side_by_side,
    some_lengths,
)
from tests.kernels.attend.test_dense_pages import by_table


def error(key_bits: float, value_bits: float, dim: int, queries: int, dtype: str, extras: str) -> float:
    """Relative error of one call against float64 attention on the decoded tokens."""
    kind = getattr(torch, dtype)
    triton_attend.MOST_QUERIES = 3 if "passes" in extras else 128
    rotation = next((kind for kind in ("haar", "identity") if kind in extras), "hadamard")
    means = "page_keys" in extras
    options = {"rotation": rotation, "page_keys": means, "planes": "planes" in extras}
    options["codebook"] = "lloyd_max" if "lloyd" in extras else "int8"
    options["estimator"] = "prod" if "prod" in extras else "mse"
    sides = [packed(dim, dim, bits, **options) for bits in (key_bits, value_bits)]
    keys = sides[0].keys
    if "one_transform" in extras:
        keys = replace(keys, transform=keys.transform.map(lambda part: part[:1]))
    pages = PackedSegment(keys, sides[1].values)
    if "by_head" in extras:
        pages = grouped(pages, packed(dim, dim, 4))
    run: list[Segment] = [pages, packed(dim, dim, 4)] if "two" in extras else [pages]
    segments = run
    if "alone" not in extras:
        tail = dense(37, dim, dim, kind)
        segments = [dense(4, dim, dim, kind), *run, DenseSegment(tail.keys, tail.values)]
    if "dense_tables" in extras:
        segments = [dense(8, dim, dim, kind), *run, dense(256, dim, dim, kind)][int("no_sinks" in extras) :]
    clean = segments
    if "pool" in extras:
        return pool_error(segments, torch.randn(2, KV_HEADS * GROUP, queries, dim).to(kind).float(), extras)
    if "lengths" in extras:
        pairs = [in_use(segment, some_lengths(segment.tokens, min(queries, 4))) for segment in segments]
        segments, clean = [one for one, _ in pairs], [other for _, other in pairs]
    tokens = sum(segment.tokens for segment in segments)
    query = torch.randn(2, KV_HEADS * GROUP, queries, dim).to(kind).float()
    options = {
        "scaling": dim**-0.5 * 3,
        "softcap": 4.0 if "softcap" in extras else None,
        "sinks": torch.randn(KV_HEADS * GROUP) if "sinks" in extras else None,
    }
    visibility = Visibility(queries, tokens)
    if "by_head" in extras:
        with patch.object(kernels, "attend", partial(attend_triton, plain=True)):
            got = by_heads.attend(query, segments, visibility, **options)
        expected = exact(query, clean, limit_in_use(segments, queries), **options)
        return float((got - expected).norm() / expected.norm())
    assert supports(query, segments, visibility), "not covered"
    out = torch.full((*query.shape[:3], dim), torch.nan) if "out" in extras else None
    got = attend_triton(query, segments, visibility, plain=True, out=out, **options)
    assert out is None or got is out
    expected = exact(query, clean, limit_in_use(segments, queries), **options)
    assert got.shape == expected.shape
    return float((got - expected).norm() / expected.norm())


def grouped(first: PackedSegment, second: PackedSegment) -> PackedSegment:
    """The first head of one segment, and the second of another."""

    def side(one: PackedSide, other: PackedSide) -> PackedSide:
        codec = HeadGroups(((0,), (1,)), (one.codec, other.codec))  # type: ignore[arg-type]
        sides = ((0, one), (1, other))
        planes = {f"{n}.{name}": own for n, some in sides for name, own in _own_planes(some, n).items()}
        rest = other.transform.tensors()
        parts = {
            name: torch.cat([part[:, :1], rest[name][:, 1:]], 1)
            for name, part in one.transform.tensors().items()
        }
        return PackedSide(codec, planes, ChannelTransform(**parts))

    return PackedSegment(side(first.keys, second.keys), side(first.values, second.values))


def _own_planes(side: PackedSide, head: int) -> dict[str, torch.Tensor]:
    return side.codec.of_heads(side.planes, side.transform, (head,))[1]


def pool_error(segments: list[Segment], query: torch.Tensor, extras: str) -> float:
    """The same where pages lie in a pool and tokens in use begin anywhere."""
    queries, changed = query.shape[2], list[Segment]()
    triton_attend.PLAIN_PROGRAMS = 8 if "few" in extras else 16
    for segment in segments:
        lengths = some_lengths(segment.tokens, min(queries, segment.tokens))
        starts = (torch.rand(lengths.shape) * (segment.tokens - lengths + 1)).int()
        if "right" in extras:
            starts = segment.tokens - lengths
        if "shared" in extras:
            starts = 0 * starts
        if "sinks_in_pages" in extras and isinstance(segment, PackedSegment):
            starts = torch.full_like(starts, 4)
            lengths = (lengths - starts).clamp(min=0)
        if isinstance(segment, PackedSegment):
            pool = pooled(segment, lengths, starts)
            if "side_by_side" in extras:
                pool = side_by_side(pool)
            if "shared" in extras:
                assert pool.table is not None
                count = scheduled_programs(pool.pages, lengths.numel(), triton_attend.PLAIN_PROGRAMS)
                schedule = PageSchedule.empty(lengths.numel(), count, pool.device)
                pool = replace(pool, starts=starts if starts.any() else None, schedule=schedule)
                launch_schedule(lengths, pool.table, pool.starts, schedule)
            changed.append(pool)
        else:
            changed.append(DenseSegment(segment.keys, segment.values, lengths, starts))
    clean = list(changed)
    if "dense_tables" in extras:
        for at, one in enumerate(clean):
            if isinstance(one, DenseSegment) and one.lengths is not None and one.starts is not None:
                changed[at] = by_table(one, 4 if one.tokens == 8 else 128, one.lengths, one.starts)
    visibility = Visibility(queries, sum(segment.tokens for segment in segments))
    assert supports(query, changed, visibility), "not covered"
    got = attend_triton(query, changed, visibility, scaling=0.2, plain=True)
    expected = attend_reference(query.double(), clean, visibility, scaling=0.2)
    return float((got - expected).norm() / expected.norm())


if __name__ == "__main__":
    print(json.dumps([error(*case) for case in json.loads(sys.argv[1])]))
