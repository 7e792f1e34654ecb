"""Attention over segments against float64 softmax attention on the decoded tokens."""

import math
from dataclasses import replace

import pytest
import torch

import quantpress.kernels.attend.reference as reference
from quantpress.codecs.protocol import PageCodec
from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend
from quantpress.kernels.attend.schedule import PageSchedule
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform, key_statistics, value_statistics
from tests.grids import covering
from tests.kernels.attend.bit_planes import BitPlanes

BATCH, KV_HEADS, GROUP, PAGES = 2, 2, 3, 3
TOLERANCE = 2e-6  # float32 arithmetic over 400 tokens, relative to the output's norm


def packed(
    dim: int,
    value_dim: int,
    bits: float,
    estimator: str = "mse",
    rotation: str = "hadamard",
    page_keys: bool = False,
    planes: bool = False,
    codebook: str = "int8",
) -> PackedSegment:
    spec = CodecSpec(dim, bits, "key", rotation, estimator=estimator, page_keys=page_keys, codebook=codebook)
    key_codec: PageCodec = ScalarPages(spec)
    value_codec: PageCodec = ScalarPages(CodecSpec(value_dim, bits, "value", rotation, codebook=codebook))
    if planes:
        key_codec, value_codec = BitPlanes(dim, int(bits), "key"), BitPlanes(value_dim, int(bits), "value")
    keys = torch.randn(BATCH, KV_HEADS, PAGES * 128, dim) * torch.rand(dim).exp() + 3 * torch.randn(dim)
    if page_keys:
        keys += torch.randn(BATCH, KV_HEADS, PAGES, dim).repeat_interleave(128, 2)
    values = torch.randn(BATCH, KV_HEADS, PAGES * 128, value_dim)
    moment = torch.rand(BATCH, KV_HEADS, dim) + 0.1
    key_transform = key_statistics(keys, moment, key_codec.groups)
    value_transform = value_statistics(values, value_codec.groups)
    return PackedSegment(
        PackedSide(key_codec, key_codec.encode(keys, key_transform), key_transform),
        PackedSide(value_codec, value_codec.encode(values, value_transform), value_transform),
    )


def dense(tokens: int, dim: int, value_dim: int, dtype: torch.dtype = torch.float32) -> DenseSegment:
    return DenseSegment(
        torch.randn(BATCH, KV_HEADS, tokens, dim).to(dtype),
        torch.randn(BATCH, KV_HEADS, tokens, value_dim).to(dtype),
    )


def decoded(segments: list[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    def side(packed_side: PackedSide) -> torch.Tensor:
        return packed_side.codec.decode(packed_side.planes, packed_side.transform, torch.float64)

    keys = [s.keys.double() if isinstance(s, DenseSegment) else side(s.keys) for s in segments]
    values = [s.values.double() if isinstance(s, DenseSegment) else side(s.values) for s in segments]
    return torch.cat(keys, 2), torch.cat(values, 2)


def exact(
    query: torch.Tensor,
    segments: list[Segment],
    limit: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """float64 attention with everything there at once; `limit` is added to the scores."""
    keys, values = (t.repeat_interleave(GROUP, dim=1) for t in decoded(segments))
    scores = query.double() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores + limit
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ values
    return scores.softmax(-1) @ values


def causal_limit(queries: int, tokens: int) -> torch.Tensor:
    return torch.full((queries, tokens), -math.inf, dtype=torch.float64).triu(tokens - queries + 1)


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(
    ("bits", "dims", "queries"),
    covering([1, 2, 2.5, 3, 3.5, 4, 8], [(64, 64), (80, 80), (128, 64)], [1, 5]),
    ids=str,
)
def test_three_segments(bits: float, dims: tuple[int, int], queries: int) -> None:
    dim, value_dim = dims
    segments: list[Segment] = [
        dense(4, dim, value_dim),
        packed(dim, value_dim, bits),
        dense(37, dim, value_dim),
    ]
    tokens = sum(segment.tokens for segment in segments)
    query = torch.randn(BATCH, KV_HEADS * GROUP, queries, dim)
    got = attend(query, segments, Visibility(queries, tokens), scaling=dim**-0.5)
    assert_close(got, exact(query, segments, causal_limit(queries, tokens), dim**-0.5))


def test_estimator_with_a_sketch() -> None:
    segments: list[Segment] = [packed(64, 64, 3, estimator="prod"), dense(9, 64, 64)]
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64)
    got = attend(query, segments, Visibility(1, PAGES * 128 + 9), scaling=0.125)
    assert_close(got, exact(query, segments, torch.zeros(1), 0.125), 1e-5)


@pytest.mark.parametrize("workspace", [1, 128 * 32 * 4, 10**9], ids=["one_page", "small", "all"])
def test_any_chunk_size(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "WORKSPACE_VALUES", workspace)
    segments: list[Segment] = [packed(64, 64, 4), dense(300, 64, 64)]
    tokens = PAGES * 128 + 300
    query = 4 * torch.randn(BATCH, KV_HEADS * GROUP, 290, 64)
    got = attend(query, segments, Visibility(290, tokens), scaling=0.3)
    assert_close(got, exact(query, segments, causal_limit(290, tokens), 0.3), 1e-5)


def test_workspace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No decoded chunk and no block of scores is larger than the workspace says."""
    sizes: list[int] = []
    add = reference.OnlineSoftmax.add

    def record(self: reference.OnlineSoftmax, scores: torch.Tensor, values: torch.Tensor) -> None:
        sizes.extend([scores.numel(), values.numel()])
        add(self, scores, values)

    monkeypatch.setattr(reference.OnlineSoftmax, "add", record)
    limit = BATCH * KV_HEADS * 128 * 64
    monkeypatch.setattr(reference, "WORKSPACE_VALUES", limit)
    segments: list[Segment] = [packed(64, 64, 4), dense(300, 64, 64)]
    attend(
        torch.randn(BATCH, KV_HEADS * GROUP, 1, 64), segments, Visibility(1, PAGES * 128 + 300), scaling=0.125
    )
    assert len(sizes) == 2 * (PAGES + 3) and max(sizes) <= limit


@pytest.mark.parametrize("kind", ["bool", "float", "per_head"])
def test_explicit_masks(kind: str) -> None:
    segments: list[Segment] = [dense(4, 64, 64), packed(64, 64, 4), dense(20, 64, 64)]
    tokens, queries = PAGES * 128 + 24, 6
    heads = KV_HEADS * GROUP if kind == "per_head" else 1
    seen = torch.rand(BATCH, heads, queries, tokens) < 0.7
    limit = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    query = torch.randn(BATCH, KV_HEADS * GROUP, queries, 64)
    mask = seen if kind == "bool" else limit + (torch.randn(seen.shape) if kind == "float" else 0)
    longer = torch.nn.functional.pad(mask, (0, 50))  # masks may be made for more tokens than there are
    expected = exact(query, segments, (limit if kind == "bool" else mask).double(), 0.125)
    for one in (mask, longer):
        got = attend(query, segments, Visibility(queries, tokens, mask=one), scaling=0.125)
        assert_close(got, expected)


def test_softcap_sinks_and_dropped_entries() -> None:
    segments: list[Segment] = [dense(4, 64, 64), packed(64, 64, 4), dense(20, 64, 64)]
    tokens = PAGES * 128 + 24
    dropped = torch.rand(BATCH, KV_HEADS, tokens) < 0.5
    limit = torch.zeros(dropped.shape).masked_fill(dropped, -math.inf)
    limit = limit.repeat_interleave(GROUP, dim=1)[:, :, None].double()
    query, sinks = 5 * torch.randn(BATCH, KV_HEADS * GROUP, 1, 64), torch.randn(KV_HEADS * GROUP)
    got = attend(
        query, segments, Visibility(1, tokens, dropped=dropped), scaling=0.125, softcap=2.0, sinks=sinks
    )
    assert_close(got, exact(query, segments, limit, 0.125, softcap=2.0, sinks=sinks))


def test_large_scores_and_blind_queries_stay_finite() -> None:
    segments: list[Segment] = [packed(64, 64, 4), dense(8, 64, 64)]
    tokens = PAGES * 128 + 8
    query = 1e4 * torch.randn(BATCH, KV_HEADS * GROUP, 2, 64)
    mask = torch.ones(1, 1, 2, tokens, dtype=torch.bool)
    mask[:, :, 0] = False
    got = attend(query, segments, Visibility(2, tokens, mask=mask), scaling=1.0)
    assert torch.isfinite(got).all()
    assert (got[:, :, 0] == 0).all()
    assert (got[:, :, 1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs(dtype: torch.dtype) -> None:
    """Output rounding is all that 16-bit queries and tails add."""
    segments: list[Segment] = [packed(64, 64, 4), dense(37, 64, 64, dtype)]
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64).to(dtype)
    got = attend(query, segments, Visibility(1, PAGES * 128 + 37), scaling=0.125)
    assert got.dtype == dtype
    expected = exact(query, segments, torch.zeros(1), 0.125)
    rounding = float((expected.to(dtype) - expected).norm() / expected.norm())
    assert_close(got, expected, 1.5 * rounding)


def test_lossless_pages_are_plain_attention() -> None:
    codec = RawPages(64)
    keys, values = torch.randn(2, BATCH, KV_HEADS, 256, 64)
    sides = [
        PackedSide(codec, codec.encode(x, ChannelTransform()), ChannelTransform()) for x in (keys, values)
    ]
    query = torch.randn(BATCH, KV_HEADS * GROUP, 4, 64)
    got = attend(query, [PackedSegment(*sides)], Visibility(4, 256), scaling=0.125)
    repeated = [t.repeat_interleave(GROUP, dim=1) for t in (keys, values)]
    mask = torch.ones(4, 256, dtype=torch.bool).tril(252)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.125)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def in_use(segment: Segment, lengths: torch.Tensor) -> tuple[Segment, Segment]:
    """The segment with NaN behind its lengths, and the same with zeros there and no lengths, to decode."""
    behind = torch.arange(segment.tokens) >= lengths.unsqueeze(-1)  # [B, Hkv, T]
    if isinstance(segment, DenseSegment):
        both = [
            (s.masked_fill(behind.unsqueeze(-1), x) for s in (segment.keys, segment.values))
            for x in (math.nan, 0)
        ]
        return DenseSegment(*both[0], lengths), DenseSegment(*both[1])

    def filled(side: PackedSide, number: float) -> PackedSide:
        planes = dict(side.planes)
        for name in planes:
            if name.startswith("scale"):
                planes[name] = planes[name].masked_fill(behind.view(planes[name].shape), number)
        return PackedSide(side.codec, planes, side.transform)

    poisoned = PackedSegment(filled(segment.keys, math.nan), filled(segment.values, math.nan), lengths)
    return poisoned, PackedSegment(filled(segment.keys, 0), filled(segment.values, 0))


def limit_in_use(segments: list[Segment], queries: int, group: int = GROUP) -> torch.Tensor:
    """[B, Hq, Tq, T]: minus infinity for tokens not in use and for the newest that a query must not see."""
    shape = (BATCH, KV_HEADS)
    lengths = [torch.as_tensor(segment.used).expand(shape) for segment in segments]
    used = [
        torch.arange(segment.tokens) < length.unsqueeze(-1)
        for segment, length in zip(segments, lengths, strict=True)
    ]
    seen = torch.cat(used, -1)  # [B, Hkv, T]
    newer = seen.flip(-1).cumsum(-1).flip(-1)  # tokens in use from this one on
    waiting = torch.arange(queries - 1, -1, -1).unsqueeze(-1)
    seen = seen.unsqueeze(2) & (newer.unsqueeze(2) > waiting)
    limit = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
    return limit.repeat_interleave(group, dim=1)


def some_lengths(most: int, least: int = 0) -> torch.Tensor:
    """[B, Hkv] int32, none and all among them."""
    lengths = torch.randint(least, most + 1, (BATCH, KV_HEADS), dtype=torch.int32)
    lengths[0, 0], lengths[1, 1] = most, least
    return lengths


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("which", ["packed", "last", "all", "all_and_few", "only_packed"])
def test_lengths_of_segments(which: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage behind the lengths never shows, whatever the chunks; each head ends where its length says."""
    monkeypatch.setattr(reference, "WORKSPACE_VALUES", 128 * 32 * 4)
    whole: list[Segment] = [dense(4, 64, 64), packed(64, 64, 3), dense(37, 64, 64)]
    if which == "only_packed":
        whole = whole[1:2]
    least = 0 if which == "all_and_few" else queries
    pairs: list[tuple[Segment, Segment]] = []
    for number, segment in enumerate(whole):
        chosen = which not in ("packed", "last") or number == {"packed": 1, "last": 2}[which]
        pairs.append(
            in_use(segment, some_lengths(segment.tokens, min(least, 4))) if chosen else (segment, segment)
        )
    segments, clean = [one for one, _ in pairs], [other for _, other in pairs]
    tokens = sum(segment.tokens for segment in segments)
    query, sinks = torch.randn(BATCH, KV_HEADS * GROUP, queries, 64), torch.randn(KV_HEADS * GROUP)
    got = attend(query, segments, Visibility(queries, tokens), scaling=0.3, sinks=sinks)
    assert_close(got, exact(query, clean, limit_in_use(segments, queries), 0.3, sinks=sinks))


def test_nothing_in_use_is_zero() -> None:
    empty = torch.zeros(BATCH, KV_HEADS, dtype=torch.int32)
    segments = [in_use(packed(64, 64, 4), empty)[0], in_use(dense(9, 64, 64), empty)[0]]
    query = torch.randn(BATCH, KV_HEADS * GROUP, 2, 64)
    got = attend(query, segments, Visibility(2, PAGES * 128 + 9), scaling=0.125)
    assert (got == 0).all()


def pooled(segment: PackedSegment, lengths: torch.Tensor, starts: torch.Tensor) -> PackedSegment:
    """The same pages as rows of a pool, in any order, with rows of noise; only those in use have a row."""
    first, last = starts // 128, (starts + lengths + 127) // 128
    page = torch.arange(segment.pages, device=segment.device)
    held = (page >= first.unsqueeze(-1)) & (page < last.unsqueeze(-1))  # [B, Hkv, P]
    rows = torch.randperm(int(held.sum()) + 5, device=segment.device)
    table = torch.zeros(held.shape, dtype=torch.int32, device=segment.device)
    table[held] = rows[: int(held.sum())].int()

    def side(one: PackedSide) -> PackedSide:
        planes = {}
        for name, plane in one.planes.items():
            noise = torch.randint(0, 100, (len(rows), *plane.shape[3:]), device=segment.device)
            pool = noise.to(plane.dtype)
            pool[table[held].long()] = plane[held]
            planes[name] = pool
        return PackedSide(one.codec, planes, one.transform)

    return PackedSegment(side(segment.keys), side(segment.values), lengths, table, starts)


def side_by_side(segment: PackedSegment) -> PackedSegment:
    """The same pages with codes and scales of keys and values in one row of an engine's memory."""
    sides = (segment.keys, segment.values)
    sizes = [plane.shape[1] * plane.itemsize for side in sides for plane in side.planes.values()]
    rows = next(iter(segment.keys.planes.values())).shape[0]
    memory = torch.full((rows, sum(sizes) + 64), 0xA5, dtype=torch.uint8, device=segment.device)
    parts = iter(memory.split([*sizes, 64], 1))
    moved = []
    for side in sides:
        planes = {name: next(parts).view(plane.dtype) for name, plane in side.planes.items()}
        for name, plane in planes.items():
            plane.copy_(side.planes[name])
            assert not plane.is_contiguous()
        moved.append(PackedSide(side.codec, planes, side.transform))
    return replace(segment, keys=moved[0], values=moved[1])


def test_pages_side_by_side_are_decoded() -> None:
    pages = packed(64, 64, 3)
    lengths = torch.full((BATCH, KV_HEADS), pages.tokens, dtype=torch.int32)
    pool = pooled(pages, lengths, 0 * lengths)
    for side, moved in zip(
        (pool.keys, pool.values), (side_by_side(pool).keys, side_by_side(pool).values), strict=True
    ):
        one = side.transform.map(lambda part: part[:1, :1])
        apart, together = (
            side.codec.decode({name: plane[None, None] for name, plane in planes.items()}, one, torch.float32)
            for planes in (side.planes, moved.planes)
        )
        assert torch.equal(together, apart)


@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("which", ["pages", "right", "recent", "no_starts"])
def test_pages_by_table(which: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Single pages anywhere in a pool, tokens in use from any place on, against each head on its own."""
    monkeypatch.setattr(reference, "WORKSPACE_VALUES", 128 * 32 * 4)
    pages, recent = packed(64, 64, 3), dense(150, 64, 64)
    lengths = some_lengths(pages.tokens)
    starts = (torch.rand(BATCH, KV_HEADS) * (pages.tokens - lengths + 1)).int()
    if which == "right":
        starts = pages.tokens - lengths
    if which == "no_starts":
        starts = torch.zeros_like(starts)
    table = pooled(pages, lengths, starts)
    if which == "right":
        table = side_by_side(table)
    if which == "no_starts":
        table = PackedSegment(table.keys, table.values, lengths, table.table)
    absent = some_lengths(100, 0) if which == "recent" else torch.zeros(BATCH, KV_HEADS, dtype=torch.int32)
    end = DenseSegment(
        *(
            states.masked_fill((torch.arange(150) < absent.unsqueeze(-1)).unsqueeze(-1), math.nan)
            for states in (recent.keys, recent.values)
        ),
        150 - absent,
        absent,
    )
    query = torch.randn(BATCH, KV_HEADS * GROUP, queries, 64)
    got = attend(query, [table, end], Visibility(queries, pages.tokens + 150), scaling=0.3)
    keys, values = decoded([pages, recent])
    expected = torch.empty(query.shape, dtype=torch.float64)
    for b in range(BATCH):
        for h in range(KV_HEADS):
            low, high = int(starts[b, h]), int(starts[b, h] + lengths[b, h])
            kept = [*range(low, high), *range(pages.tokens + int(absent[b, h]), pages.tokens + 150)]
            seen = torch.ones(queries, len(kept), dtype=torch.bool).tril(len(kept) - queries)
            group = slice(GROUP * h, GROUP * (h + 1))
            expected[b, group] = torch.nn.functional.scaled_dot_product_attention(
                query[b, group].double(),
                keys[b, h, kept].expand(GROUP, -1, -1),
                values[b, h, kept].expand(GROUP, -1, -1),
                attn_mask=seen,
                scale=0.3,
            )
    assert_close(got, expected)


def test_heads_may_share_pages() -> None:
    """As beams share a context, and sequences a common prefix."""
    pages = packed(64, 64, 4)
    one = {name: plane[:1] for name, plane in pages.keys.planes.items()}
    both = {name: plane[:1] for name, plane in pages.values.planes.items()}
    transforms = [
        side.transform.map(lambda part: part[:1].expand(BATCH, -1, -1)) for side in (pages.keys, pages.values)
    ]
    table = torch.arange(KV_HEADS * PAGES, dtype=torch.int32).view(1, KV_HEADS, PAGES).expand(BATCH, -1, -1)
    lengths = torch.full((BATCH, KV_HEADS), pages.tokens, dtype=torch.int32)
    sides = [
        PackedSide(side.codec, {name: plane.flatten(0, 2) for name, plane in planes.items()}, transform)
        for side, planes, transform in zip((pages.keys, pages.values), (one, both), transforms, strict=True)
    ]
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64)
    got = attend(query, [PackedSegment(*sides, lengths, table)], Visibility(1, pages.tokens), scaling=0.125)
    whole = [
        PackedSide(side.codec, {n: p.expand(BATCH, *p.shape[1:]) for n, p in planes.items()}, transform)
        for side, planes, transform in zip((pages.keys, pages.values), (one, both), transforms, strict=True)
    ]
    assert_close(got, exact(query, [PackedSegment(*whole)], torch.zeros(1), 0.125))


def test_a_bad_table_is_refused() -> None:
    query, pages = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64), packed(64, 64, 4)
    lengths = torch.full((BATCH, KV_HEADS), pages.tokens, dtype=torch.int32)
    good = pooled(pages, lengths, torch.zeros_like(lengths))
    assert good.table is not None
    for table in (good.table.long(), good.table[:1], good.table[..., 0]):
        with pytest.raises(InvalidInputError, match="the table of a segment is"):
            bad = PackedSegment(good.keys, good.values, lengths, table)
            attend(query, [bad], Visibility(1, bad.tokens), scaling=1.0)
    for made in (
        lambda: PackedSegment(good.keys, good.values, None, good.table),
        lambda: PackedSegment(pages.keys, pages.values, None, None, lengths),
        lambda: DenseSegment(query, query, starts=lengths),
    ):
        with pytest.raises(InvalidInputError, match="no lengths"):
            made()
    with pytest.raises(InvalidInputError, match="a schedule is for pages by table"):
        replace(pages, schedule=PageSchedule.empty(BATCH * KV_HEADS, 9, pages.device))


def test_lengths_of_another_shape_are_refused() -> None:
    query, tail = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64), dense(9, 64, 64)
    for lengths in (torch.zeros(BATCH, dtype=torch.int32), torch.zeros(BATCH, KV_HEADS)):
        segment = DenseSegment(tail.keys, tail.values, lengths)
        with pytest.raises(InvalidInputError, match="lengths of a segment"):
            attend(query, [segment], Visibility(1, 9), scaling=1.0)


def test_wrong_lengths_are_refused() -> None:
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64)
    with pytest.raises(InvalidInputError, match="attention over 9 tokens, but the mask is for 10"):
        attend(query, [dense(9, 64, 64)], Visibility(1, 10), scaling=1.0)
    with pytest.raises(InvalidInputError, match="5 query heads are not a multiple of 2"):
        attend(query[:, :5], [dense(9, 64, 64)], Visibility(1, 9), scaling=1.0)
    with pytest.raises(InvalidInputError, match="attention over 0 tokens"):
        attend(query, [], Visibility(1, 0), scaling=1.0)


def test_slots_pick_tokens_and_transforms() -> None:
    """Sequences in any order, each with its own 16-bit tokens and transform, against each on its own."""
    pages, tail = packed(64, 64, 4), dense(9, 64, 64)
    lengths = torch.full((BATCH, KV_HEADS), pages.tokens, dtype=torch.int32)
    pool = pooled(pages, lengths, 0 * lengths)
    assert pool.table is not None and pages.keys.transform.mean is not None
    slots = torch.arange(BATCH - 1, -1, -1)
    turned = PackedSegment(pool.keys, pool.values, lengths, pool.table[slots])
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64)
    visibility = Visibility(1, pages.tokens + 9)
    expected = attend(query, [pages, tail], visibility, scaling=0.1)
    got = attend(query[slots], [turned, tail], visibility, scaling=0.1, slots=slots)
    torch.testing.assert_close(got[slots], expected)
    with pytest.raises(InvalidInputError, match=r"slots are torch.int32"):
        attend(query, [pool, tail], visibility, scaling=0.1, slots=slots.int())
    with pytest.raises(InvalidInputError, match="without a table"):
        attend(query, [pages, tail], visibility, scaling=0.1, slots=slots)
