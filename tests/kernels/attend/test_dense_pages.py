"""16-bit tokens in pages of a pool: against the same tokens without a table, and calls that are refused."""

import math
from dataclasses import replace

import pytest
import torch

import quantpress.kernels.attend.reference as reference
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, Segment, Visibility, attend
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.triton_attend import supports
from quantpress.kernels.attend.triton_dense import supports_dense
from tests.kernels.attend.test_attend import (
    BATCH,
    GROUP,
    KV_HEADS,
    assert_close,
    dense,
    packed,
    pooled,
    some_lengths,
)


def by_table(segment: DenseSegment, page: int, lengths: torch.Tensor, starts: torch.Tensor) -> DenseSegment:
    """The same tokens in pages of a pool, keys and values side by side; NaN in all that is not in use."""
    batch, heads, tokens, dim = segment.keys.shape
    pages, device = tokens // page, segment.device
    token = torch.arange(tokens, device=device)
    used = (token >= starts.unsqueeze(-1)) & (token < (starts + lengths).unsqueeze(-1))  # [B, Hkv, T]
    held = used.any(1).view(batch, pages, page).any(-1)
    rows = torch.randperm(batch * pages + 3, device=device)
    table = torch.where(held, rows[3:].view(batch, pages), rows[0]).int()
    pool = segment.keys.new_full((len(rows), heads, 2, page, dim), math.nan)
    for side, states in enumerate((segment.keys, segment.values)):
        clean = states.masked_fill(~used.unsqueeze(-1), math.nan)
        split = clean.view(batch, heads, pages, page, dim).transpose(1, 2)
        pool[table[held].long(), :, side] = split[held]
    return DenseSegment(pool[:, :, 0], pool[:, :, 1], lengths, starts, table)


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("alone", [False, True], ids=["beside_packed", "alone"])
def test_tokens_by_table(alone: bool, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pages of 4 sinks and two of 128 recent tokens, any of them in use, whatever the chunks."""
    monkeypatch.setattr(reference, "WORKSPACE_VALUES", 128 * 32 * 4)
    plain, tables = list[Segment](), list[Segment]()
    pages = packed(64, 64, 3)
    for tokens, page in ((8, 4), (256, 128)):
        one, lengths = dense(tokens, 64, 64), some_lengths(tokens)
        starts = (torch.rand(BATCH, KV_HEADS) * (tokens - lengths + 1)).int()
        plain.append(DenseSegment(one.keys, one.values, lengths, starts))
        tables.append(by_table(one, page, lengths, starts))
    if not alone:
        held = some_lengths(pages.tokens)
        plain.insert(1, pooled(pages, held, 0 * held))
        tables.insert(1, plain[1])
    query = torch.randn(BATCH, KV_HEADS * GROUP, queries, 64)
    visibility = Visibility(queries, sum(segment.tokens for segment in plain))
    assert visibility.tokens == sum(segment.tokens for segment in tables)
    expected = attend_reference(query.double(), plain, visibility, scaling=0.3)
    assert_close(attend(query, tables, visibility, scaling=0.3), expected)


def test_what_the_kernels_read_by_table() -> None:
    """Pools of the query's dtype whose tokens lie together, and no other 16-bit tokens without a table."""
    pages, lengths = packed(64, 64, 4), torch.full((BATCH, KV_HEADS), 128, dtype=torch.int32)
    recent = by_table(dense(128, 64, 64), 128, lengths, 0 * lengths)
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64)

    def covered(*segments: Segment, q: torch.Tensor = query) -> bool:
        return supports(q, segments, Visibility(1, sum(segment.tokens for segment in segments)))

    assert covered(pages, recent)
    assert not covered(pages, recent, q=query.bfloat16())
    assert not covered(dense(4, 64, 64), pages, recent)
    turned = recent.keys.transpose(1, 2).contiguous().transpose(1, 2)
    assert not covered(pages, replace(recent, keys=turned))
    assert not supports_dense(query, [recent], Visibility(1, 128))


def test_a_bad_table_is_refused() -> None:
    tail, lengths = dense(8, 64, 64), torch.full((BATCH, KV_HEADS), 8, dtype=torch.int32)
    good = by_table(tail, 4, lengths, 0 * lengths)
    assert good.table is not None
    query = torch.randn(BATCH, KV_HEADS * GROUP, 1, 64)
    with pytest.raises(InvalidInputError, match=r"no lengths"):
        DenseSegment(good.keys, good.values, table=good.table)
    with pytest.raises(InvalidInputError, match=r"torch.int64 \(2, 2\); give torch.int32 \[B, P\]"):
        replace(good, table=good.table.long())
    with pytest.raises(InvalidInputError, match=r"not pools of the same pages"):
        replace(good, values=good.values[1:])
    with pytest.raises(InvalidInputError, match=r"table of a segment is \(1, 2\).*give \[2, P\]"):
        attend(query, [replace(good, table=good.table[:1])], Visibility(1, 8), scaling=1.0)
    slots = torch.arange(BATCH)
    with pytest.raises(InvalidInputError, match=r"slots beside 16-bit tokens with a table"):
        attend(query, [good], Visibility(1, 8), scaling=1.0, slots=slots)
    with pytest.raises(InvalidInputError, match=r"slots beside 16-bit tokens with a table"):
        good.of_slots(slots)


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_tokens_by_table_on_a_gpu(dim: int, queries: int) -> None:
    from tests.kernels.attend.test_triton_attend import on_device

    batch, heads = 3, 2
    pages = on_device(batch, heads, 4 * 128, dim, (4, 3))
    used = torch.tensor([[0, 512], [300, 512], [100, 17]], dtype=torch.int32, device="cuda")
    plain, tables = list[Segment](), list[Segment]()
    for tokens, page in ((4, 4), (256, 128)):
        states = torch.randn(2, batch, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
        starts = torch.randint(tokens // 4, (batch, heads), dtype=torch.int32, device="cuda")
        lengths = torch.randint(queries, tokens // 2 + 3, (batch, heads), dtype=torch.int32, device="cuda")
        lengths = torch.minimum(lengths, tokens - starts)
        plain.append(DenseSegment(states[0], states[1], lengths, starts))
        tables.append(by_table(DenseSegment(states[0], states[1]), page, lengths, starts))
    for both in (plain, tables):
        both.insert(1, pooled(pages, used, 0 * used))
    query = torch.randn(batch, heads * GROUP, queries, dim, device="cuda", dtype=torch.bfloat16)
    visibility = Visibility(queries, 4 + 4 * 128 + 256)
    assert supports(query, tables, visibility)
    got = attend(query, tables, visibility, scaling=dim**-0.5)
    expected = attend_reference(query.double(), plain, visibility, scaling=dim**-0.5)
    assert float((got.double() - expected).norm() / expected.norm()) < 3e-3
