"""The split kernel with queries and 16-bit tokens of its own: its source in PyTorch, through its launch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from quantpress.kernels.attend import DenseSegment, PackedSegment, Segment, Visibility
from quantpress.kernels.attend.calls import call as calling
from quantpress.kernels.attend.calls.call import Call
from quantpress.kernels.attend.calls.settings import LOG2_E, opens_call
from quantpress.kernels.attend.opening.arguments import Opening, shares, shares_by_table
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.schedule import scheduled_programs
from tests.kernels.attend import emulate_gluon
from tests.kernels.attend.test_attend import (
    BATCH,
    GROUP,
    KV_HEADS,
    dense,
    in_use,
    packed,
    pooled,
    some_lengths,
)
from tests.kernels.attend.test_dense_pages import by_table
from tests.kernels.attend.test_split_mma import (
    Emulated,
    bounds_of_call,
    emulated,
    prepared,
    with_schedule,
)

BF16, FP16 = torch.bfloat16, torch.float16
__all__ = ["emulated"]  # a fixture

pytest.importorskip("triton")


def joined(call: Any, sums: list[torch.Tensor], of_dense: list[torch.Tensor]) -> torch.Tensor:
    """What the merge makes of the sums over packed and over 16-bit tokens: [B, Hq, Tq, Dv]."""
    bounds = None if call.table is None else bounds_of_call(call)
    out = torch.zeros(call.heads, call.rows, call.values.head_dim, dtype=torch.float64)
    for head in range(call.heads):
        held = slice(None) if bounds is None else slice(*bounds[head].tolist())
        for row in range(call.rows):
            block, local = head * call.blocks + row // call.block, row % call.block
            at = block if bounds is None else row // call.block
            packed_o = call.values.rotation.inverse(sums[0][at, held, local].double() * call.values.unit)
            o = torch.cat([packed_o, of_dense[0][block, :, local].double()])
            m, total = (
                torch.cat([one[at, local, held], other[block, local]]).double()
                for one, other in zip(sums[1:], of_dense[1:], strict=True)
            )
            weights = (m - m.max()).exp2()
            whole = (weights * total).sum()
            if whole > 0:
                out[head, row] = weights @ o / whole
    return out.view(call.batch, call.query_heads, call.queries, -1)


def check(
    query: torch.Tensor,
    segments: list[Segment],
    softcap: float | None = None,
) -> Opening:
    """Attention as it should be, of one launch and a merge."""
    (pages,) = (one for one in segments if isinstance(one, PackedSegment))
    before, after = (one if isinstance(one, DenseSegment) else None for one in (segments[0], segments[-1]))
    cap = 0.0 if softcap is None else softcap * LOG2_E
    call = Call(query, pages, None, 0.2 * LOG2_E, cap, plain=False)
    opening, of_dense = call.first(before, after)
    assert isinstance(opening, Opening)
    got = joined(call, call.attend(opening), of_dense)
    visibility = Visibility(query.shape[2], sum(segment.tokens for segment in segments))
    expected = attend_reference(query.double(), segments, visibility, scaling=0.2, softcap=softcap)
    tolerance = 1e-3 if call.keys.bits == 1 else 2e-4
    assert float((got - expected).norm() / expected.norm()) < tolerance
    return opening


def tokens(count: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> DenseSegment:
    return dense(count, dim, dim, dtype)


def queries(count: int, dim: int, group: int = GROUP, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(BATCH, KV_HEADS * group, count, dim).to(dtype)


@pytest.mark.parametrize(
    ("bits", "dim", "count", "dtype", "programs"),
    [(2, 128, 1, BF16, 8), (1, 64, 2, FP16, 40), (3, 64, 2, BF16, 8), (8, 128, 1, FP16, 28)],
)
def test_packed_and_other_tokens(
    bits: int,
    dim: int,
    count: int,
    dtype: torch.dtype,
    programs: int,
    emulated: Emulated,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In programs of their own where there is room for these."""
    monkeypatch.setattr(calling, "programs_at_a_time", lambda device: programs)
    pages = packed(dim, dim, bits)
    opening = check(queries(count, dim, dtype=dtype), [tokens(4, dim, dtype), pages, tokens(77, dim, dtype)])
    assert (opening.beside > 0) == (programs > 8)
    check(queries(1, dim, dtype=dtype), [pages], softcap=3.0)


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_in_use(count: int, emulated: Emulated) -> None:
    """Lengths, starts, tables, a schedule, one transform for all; NaN in what is not in use."""
    pages = packed(64, 64, 3)
    recent, some = tokens(70, 64), some_lengths(pages.tokens)
    starts = (torch.rand(some.shape) * (pages.tokens - some + 1)).int()
    few = some_lengths(70, count)
    begins = (torch.rand(few.shape) * (70 - few + 1)).int()
    query = queries(count, 64)
    check(query, [in_use(pages, some)[0], in_use(recent, few)[0]])
    one = replace(pages, keys=replace(pages.keys, transform=pages.keys.transform.map(lambda part: part[:1])))
    check(query, [tokens(4, 64), pooled(one, some, starts), replace(recent, lengths=few, starts=begins)])
    first, recent, few = tokens(8, 64), tokens(256, 64), some_lengths(256, count)
    tables = [by_table(first, 4, some_lengths(8, 2), 0 * few), by_table(recent, 128, few, 0 * few)]
    check(query, [tables[0], with_schedule(pooled(pages, some, starts)), tables[1]])
    assert emulated.launches[-1]["SCHEDULED"] and emulated.launches[-1]["FIRST_PAGE"] == 4
    check(query, [pooled(pages, 0 * some, starts), tables[1]])


def test_slots(emulated: Emulated) -> None:
    pages = packed(64, 64, 4)
    some = some_lengths(pages.tokens)
    held = pooled(pages, some, 0 * some)
    slots = torch.tensor([1, 0])
    table, lengths, starts = held.table, held.lengths, held.starts
    assert table is not None and starts is not None and isinstance(lengths, torch.Tensor)
    turned = replace(held, table=table[slots], lengths=lengths[slots], starts=starts[slots])
    query, recent = queries(1, 64), tokens(33, 64)
    call = Call(query, turned, slots, 0.2 * LOG2_E, 0.0, plain=False)
    opening, of_dense = call.first(None, recent)
    got = joined(call, call.attend(opening), of_dense)
    expected = attend_reference(
        query[slots].double(), [held, recent], Visibility(1, held.tokens + 33), scaling=0.2
    )
    assert float((got - expected[slots]).norm() / expected.norm()) < 2e-4


def test_keys_of_pages(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    pages, query = packed(64, 64, 3, page_keys=True), queries(2, 64)

    def page_scores(call: Any) -> torch.Tensor:
        prepared(call, call.scale)
        scores: torch.Tensor = call.page_scores
        return scores

    monkeypatch.setattr(Call, "_page_scores", page_scores)
    check(query, [pages, tokens(40, 64)])
    assert emulated.launches[-1]["PAGE_KEYS"]


@pytest.mark.parametrize("dim", [64, 128])
def test_queries_are_those_of_the_first_kernel(
    dim: int, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the last bit of a number."""
    stored = list[torch.Tensor]()
    keep = emulate_gluon.Shared.store

    def store(shared: Any, value: torch.Tensor) -> None:
        keep(shared, value)
        if shared.held.dtype == torch.int8:
            stored.append(value.clone().long())

    monkeypatch.setattr(emulate_gluon.Shared, "store", store)
    query, pages = queries(2, dim), packed(dim, dim, 4)
    check(query, [pages, tokens(5, dim)])
    call = Call(query, pages, None, 1.0, 0.0, plain=False)
    expected = prepared(call, 1.0)[0].long()[:, 0, ::2] * 256 + prepared(call, 1.0)[0].long()[:, 0, 1::2]
    assert len(stored) == call.heads * call.splits and expected.abs().max() == 127 * 256
    for number, held in enumerate(stored):
        found = held[::2] * 256 + held[1::2]
        off = (found - expected[number // call.splits])[: call.rows].abs()
        assert int(off.max()) <= 1 and float(off.float().mean()) < 0.01


def test_sums_of_other_segments_have_room(emulated: Emulated) -> None:
    call = Call(queries(1, 64), packed(64, 64, 4), None, 1.0, 0.0, plain=False)
    opening, sums = call.first(spare=2)
    assert [x.shape[1 if number == 0 else 2] for number, x in enumerate(sums)] == [2, 2, 2]
    call.attend(opening)  # writes none of them: there are no 16-bit tokens


def test_which_calls_these_are() -> None:
    """Others keep the first launch: float32, 16 rows, rotations that take a matrix, filters."""
    pages = {kind: packed(64, 64, 4, rotation=kind) for kind in ("hadamard", "haar", "identity")}
    pages |= {"planes": packed(64, 64, 2, planes=True), "wide": packed(256, 256, 4)}

    def opens(query: torch.Tensor, one: PackedSegment, rows: int = 8) -> bool:
        keys, values = (side.codec.kernel_operands() for side in (one.keys, one.values))
        assert keys is not None and values is not None
        return opens_call(query, keys, values, rows)

    short, full = queries(1, 64), queries(1, 64, dtype=torch.float32)
    assert [kind for kind, one in pages.items() if opens(short, one)] == ["hadamard"]
    assert not opens(full, pages["hadamard"]) and not opens(short, pages["hadamard"], 16)


def test_who_attends_16_bit_tokens() -> None:
    """On an H200, 8 KV heads: 16 programs beside 1024 others, one a tile at 8192 tokens, or none."""
    programs = 8 * 132
    assert shares(9, 1022, 128, 8, programs) == (2, 2)
    assert shares(9, 62, 62, 8, programs) == (9, 9)
    assert shares(9, 31, 2, 512, programs) == (2, 0)
    assert shares(0, 62, 62, 8, programs) == (0, 0)
    for heads, (parts, most) in {8: (4, 1024), 64: (1, 992), 512: (1, 1056)}.items():
        splits = scheduled_programs(1022, heads, programs)
        assert splits == most and shares_by_table(9, splits, heads, programs) == (parts, parts * heads)
