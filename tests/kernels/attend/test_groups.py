"""Two channel groups on int8 tensor cores: both kernels in PyTorch, through their launches, and compiled."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantpress.kernels.attend import DenseSegment, PackedSegment, Segment, Visibility
from quantpress.kernels.attend.calls.in_parts import GroupsCall, PartsCall
from quantpress.kernels.attend.calls.settings import LOG2_E
from quantpress.kernels.attend.opening.arguments import Opening, tile_tokens
from quantpress.kernels.attend.parts import launches
from quantpress.kernels.attend.parts.groups import ROWS, steps_of_groups
from quantpress.kernels.attend.parts.operands import turn_matrix
from quantpress.kernels.attend.reference import attend_reference
from quantpress.kernels.attend.schedule import PageSchedule
from quantpress.kernels.attend.triton_attend import attend_triton, call_of, supports
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
from tests.kernels.attend.test_merge import Emulated as EmulatedMerge
from tests.kernels.attend.test_split_mma import Emulated, bounds_of_call, emulated, with_schedule
from tests.kernels.attend.test_triton_attend import POINTERS, compiled, machine_code, without_second_parts
from tests.kernels.triton_cases import resources

pytest.importorskip("triton")

BF16, FP16 = torch.bfloat16, torch.float16
__all__ = ["emulated"]  # a fixture


@pytest.fixture(autouse=True)
def _merge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "emulated" not in request.fixturenames:
        return
    kernel = EmulatedMerge()
    monkeypatch.setattr(kernel.module, "merge_by_warps_kernel", kernel)


def pages_of(key_bits: float, value_bits: float) -> PackedSegment:
    return PackedSegment(packed(128, 128, key_bits).keys, packed(128, 128, value_bits).values)


def queries(count: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(BATCH, KV_HEADS * GROUP, count, 128).to(dtype)


def check(query: torch.Tensor, segments: list[Segment], softcap: float | None = None, **options: Any) -> None:
    """The error is that of the output's dtype, which the last launch rounds to."""
    visibility = Visibility(query.shape[2], sum(segment.tokens for segment in segments))
    given: dict[str, Any] = {"scaling": 0.2, "softcap": softcap} | options
    assert supports(query, segments, visibility)
    out = torch.empty(query.shape, dtype=torch.float32)
    got = attend_triton(query, segments, visibility, out=out, **given)
    slots = given.pop("slots", None)
    if slots is not None:
        segments = [segment.of_slots(slots) for segment in segments]
    expected = attend_reference(query.double(), segments, visibility, **given)
    assert float((got - expected).norm() / expected.norm()) < 2e-4


@pytest.mark.parametrize("last", [0, 1])
def test_pages_of_two_kinds(last: int, emulated: Emulated) -> None:
    """One kind has at most eight rows in a block, and sums of both become one output."""
    pages = pages_of(3.5, 3.5), packed(128, 128, 3)
    query = queries(ROWS // GROUP + 1)
    check(query, [dense(4, 128, 128, BF16), pages[1 - last], pages[last], dense(40, 128, 128, BF16)])
    assert {launch["R"] for launch in emulated.launches} == {ROWS}


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "count", "dtype"),
    [(3.5, 3.5, 1, BF16), (2.5, 4, 1, FP16), (1.5, 3, 2, BF16), (3.5, 1.5, 5, BF16)],
)
def test_widths(
    key_bits: float, value_bits: float, count: int, dtype: torch.dtype, emulated: Emulated
) -> None:
    """One group beside two, and both; with 16-bit tokens around them, learned logits, a softcap."""
    pages, sinks = pages_of(key_bits, value_bits), torch.randn(KV_HEADS * GROUP)
    check(queries(count, dtype), [dense(4, 128, 128, dtype), pages, dense(40, 128, 128, dtype)], sinks=sinks)
    launch = emulated.launches[-1]
    narrow = [bits // 1 if bits % 1 else 0 for bits in (key_bits, value_bits)]
    assert [launch["K2_BITS"], launch["V2_BITS"]] == narrow and launch["OPENS"]
    check(queries(1, dtype), [pages], softcap=3.0)


@pytest.mark.parametrize(("bits", "value_bits"), [(3, 2.5), (2, 3)])
def test_sketches(bits: int, value_bits: float, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys, beside codes of one bit less; queries are turned by a launch before."""
    keys = packed(128, 128, bits, estimator="prod").keys
    pages = PackedSegment(keys, packed(128, 128, value_bits).values)

    def turn(rows: Any, operands: Any, transform: Any, shared: bool, scale: float) -> list[torch.Tensor]:
        query = rows.query.double() * scale
        y = (
            query
            / transform.weight.double().flatten(0, 1).unsqueeze(1)
            @ turn_matrix(operands, query.device).double().T
        )
        return [y.float(), (query @ transform.mean.double().flatten(0, 1).unsqueeze(2)).squeeze(2).float()]

    monkeypatch.setattr(launches, "turn_queries", turn)
    check(queries(1), [dense(4, 128, 128, BF16), pages, dense(40, 128, 128, BF16)])
    check(queries(2), [pages, dense(40, 128, 128, BF16)])
    assert emulated.launches[-1]["SKETCH"]
    some = some_lengths(pages.tokens)
    check(queries(1), [with_schedule(pooled(pages, some, 0 * some)), dense(40, 128, 128, BF16)])


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_what_is_in_use(bits: float, emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, starts, a schedule, one transform for all, pages beside; NaN in what is not in use."""
    pages, recent = pages_of(bits, 6 - bits), dense(70, 128, 128, BF16)
    some = some_lengths(pages.tokens)
    starts = (torch.rand(some.shape) * (pages.tokens - some + 1)).int()
    check(queries(1), [in_use(pages, some)[0], recent])
    sides = (
        replace(one, transform=one.transform.map(lambda part: part[:1])) for one in (pages.keys, pages.values)
    )
    scheduled = with_schedule(pooled(PackedSegment(*sides), some, starts))
    check(queries(2), [scheduled, recent])
    assert emulated.launches[-1]["SCHEDULED"] and emulated.launches[-1]["HALVES"] == 2
    check(queries(1), [pages, packed(128, 128, 3), recent])


def test_tables_without_a_schedule_and_slots(emulated: Emulated) -> None:
    pages, recent = pages_of(3.5, 3.5), dense(33, 128, 128, BF16)
    some = some_lengths(pages.tokens)
    held, slots = pooled(pages, some, 0 * some), torch.tensor([1, 0])
    table, lengths, starts = held.table, held.lengths, held.starts
    assert table is not None and starts is not None and isinstance(lengths, torch.Tensor)
    turned = replace(held, table=table[slots], lengths=lengths[slots], starts=starts[slots])
    query = queries(1)
    call = GroupsCall(query, turned, slots, 0.2 * LOG2_E, 0.0, plain=False)
    opening, of_dense = call.first(None, recent)
    assert isinstance(opening, Opening) and not call._merged_by_warps()
    sums = call.attend(opening)
    call.schedule = PageSchedule(torch.empty(0), bounds_of_call(call).int())
    got = call.merge(sums, of_dense, out=torch.empty(query.shape))
    expected = attend_reference(
        query[slots].double(), [held, recent], Visibility(1, held.tokens + 33), scaling=0.2
    )
    assert float((got - expected[slots]).norm() / expected.norm()) < 2e-4


@pytest.mark.parametrize("bits", [3.5, 1.5])
def test_sums_by_table_without_a_schedule(
    bits: float, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the merge for parts is given, joined here: a group of one bit has levels of its own."""
    pages, recent = pages_of(3.5, bits), dense(33, 128, 128, BF16)
    some = some_lengths(pages.tokens)
    held, query, given = pooled(pages, some, 0 * some), queries(1), list[Any]()
    monkeypatch.setattr(launches, "merge_parts", lambda *arguments: given.extend(arguments))
    call = GroupsCall(query, held, None, 0.2 * LOG2_E, 0.0, plain=False)
    opening, of_dense = call.first(None, recent)
    call.merge(call.attend(opening), of_dense, out=torch.empty(query.shape))
    sums, values, transform = given[1], given[6], given[7]
    turn, bounds = turn_matrix(values, query.device).double(), bounds_of_call(call)
    (o, m, total), (dense_o, dense_m, dense_total) = (
        [x.double() for x in three] for three in (sums, of_dense)
    )
    got = torch.zeros(call.heads, call.rows, 128, dtype=torch.float64)
    for head, row in itertools.product(range(call.heads), range(call.rows)):
        at = slice(*bounds[head].tolist())
        weights = torch.cat([m[0, row, at], dense_m[head, row]])
        weights = (weights - weights.max()).exp2()
        of_pages = torch.zeros_like(o[0, at, row])
        of_pages[:, transform.order.flatten(0, 1)[head].long()] = o[0, at, row] @ turn
        both = torch.cat([of_pages, dense_o[head, :, row]])
        totals = torch.cat([total[0, row, at], dense_total[head, row]])
        got[head, row] = (weights[:, None] * both).sum(0) / (weights * totals).sum()
    expected = attend_reference(query.double(), [held, recent], Visibility(1, held.tokens + 33), scaling=0.2)
    assert float((got.view(expected.shape) - expected).norm() / expected.norm()) < 1e-3


def test_which_pages_these_are() -> None:
    """Others stay with the kernels for parts."""
    kinds = {
        "3.5": packed(128, 128, 3.5),
        "2.5": packed(128, 128, 2.5),
        "1.5": packed(128, 128, 1.5),
        "2.25": packed(128, 128, 2.25),
        "lloyd": packed(128, 128, 3.5, codebook="lloyd_max"),
        "haar": packed(128, 128, 3.5, rotation="haar"),
        "prod": packed(128, 128, 3, estimator="prod"),
        "prod 64": packed(64, 64, 3, estimator="prod"),
        "64": packed(64, 64, 3.5),
    }
    found = {kind: call_of(queries(1), pages, False) is GroupsCall for kind, pages in kinds.items()}
    assert [kind for kind, one in found.items() if one] == ["3.5", "2.5", "1.5", "prod"]
    assert call_of(queries(1, torch.float32), kinds["3.5"], False) is PartsCall
    assert call_of(queries(1), kinds["3.5"], True) is PartsCall
    assert isinstance(dense(1, 128, 128), DenseSegment)


@pytest.mark.parametrize(
    ("keys", "values", "rows", "capability", "heads", "spilled"),
    [
        ((4, 3), (4, 3), 4, 90, 0, 56),  # bytes: with Triton 3.9, and 48 with 3.7
        ((2, 1), (4,), 4, 100, 0, 16),
        ((3, -1), (3, 2), 8, 80, 0, 512),
    ],
)
def test_kernel_compiles_without_a_gpu(
    keys: tuple[int, ...],
    values: tuple[int, ...],
    rows: int,
    capability: int,
    heads: int,
    spilled: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """-1 is a sketch. Few registers are spilled, with four rows hardly any."""
    from quantpress.kernels.attend.split_mma import split_mma_kernel

    sketch = keys[-1] == -1
    constants: dict[str, Any] = {"D": 128, "DV": 128, "R": ROWS, "ROWS": rows, "HALVES": 1, "SKETCH": sketch}
    constants |= {"HALVES": steps_of_groups(rows, heads > 0), "STAGED": False, "PAGE_KEYS": False}
    constants |= {"K_BITS": keys[0], "V_BITS": values[0], "K_SIGNS": keys[0] == 1, "V_SIGNS": False}
    constants |= {"K_FINE": False, "V_FINE": False, "CAPPED": capability == 80, "CHAINED": capability >= 90}
    constants |= {"AHEAD": False, "IN_LANES": 0}
    constants |= {"USED": heads > 0, "STARTS": heads > 0, "HEADS": heads, "SCHEDULED": heads == 1}
    constants |= {"OPENS": True, "TILE": tile_tokens(rows, 128), "SHARED": heads == 0, "SLOTS": heads > 0}
    constants |= dict.fromkeys(("HAS_WEIGHT", "HAS_MEAN", "RECENT_USED", "RECENT_STARTS"), True)
    constants |= {"FIRST_USED": heads > 0, "FIRST_STARTS": False}
    constants |= {"FIRST_PAGE": heads and 4, "RECENT_PAGE": heads and 128}
    alone = len(keys) == 1, len(values) == 1
    constants |= without_second_parts(split_mma_kernel, *alone, alone[0] or sketch) | {"SKETCH": sketch}
    constants |= {} if alone[0] else {"K2_BITS": abs(keys[1])}
    constants |= {} if alone[1] else {"V2_BITS": values[1]}
    if sketch:
        constants["signs_ptr"] = None
        monkeypatch.setitem(POINTERS, "q_ptr", "*fp32")
    kernel = compiled(split_mma_kernel, constants, capability, 1)
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 8 * 1024
    code = machine_code(kernel)
    first = code.index("LDG.E.EF")  # the first codes are on their way before queries are turned
    assert "SHFL" not in code[code.rindex("EXIT", 0, first) : first]
    assert resources(kernel)["STACK"] <= spilled, "registers are spilled"
