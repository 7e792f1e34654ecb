"""The last launch by warps: its source in PyTorch, through its own launch, and compiled without a GPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quantpress.kernels.attend.calls import call as calling
from quantpress.kernels.attend.calls.call import Call
from quantpress.kernels.attend.calls.settings import LOG2_E
from quantpress.kernels.attend.merge.settings import warps_of_merge
from quantpress.kernels.attend.schedule import PageSchedule
from tests.kernels.attend.emulate_gluon import emulate
from tests.kernels.attend.test_attend import BATCH, GROUP, KV_HEADS, packed
from tests.kernels.attend.test_triton_attend import compiled
from tests.kernels.triton_cases import resources

pytest.importorskip("triton")

HEADS = BATCH * KV_HEADS


class Emulated:
    """In the place of the kernel: `kernel[grid](...)` runs every program here."""

    def __init__(self) -> None:
        from quantpress.kernels.attend.merge import by_warps

        kernel = by_warps.merge_by_warps_kernel
        self.module, self.fn, self.arg_names = by_warps, kernel.fn, kernel.arg_names

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(
            *arguments: Any, num_warps: int, launch_pdl: bool, enable_fp_fusion: bool, **constants: Any
        ) -> None:
            assert num_warps == constants["WARPS"] and launch_pdl and enable_fp_fusion
            given = dict(zip(self.arg_names, arguments, strict=False)) | constants
            emulate(self.module, "merge_by_warps_kernel", given, grid)

        return launch


@pytest.fixture
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Emulated()
    monkeypatch.setattr(kernel.module, "merge_by_warps_kernel", kernel)
    monkeypatch.setattr(calling, "chains", lambda device: True)


def call_of(dim: int, queries: int) -> Call:
    query = torch.randn(BATCH, KV_HEADS * GROUP, queries, dim)
    return Call(query, packed(dim, dim, 2), None, 1.0, 0.0, plain=False)


def sums_of(count: int, parts: int, rows: int, channels: int) -> list[torch.Tensor]:
    """Random partial sums [count, parts, rows, channels], scores and totals; some have no tokens."""
    m, total = 4 * torch.randn(count, rows, parts), torch.rand(count, rows, parts) + 0.1
    o = torch.randn(count, parts, rows, channels) * total.transpose(1, 2).unsqueeze(-1)
    empty = torch.rand(count, rows, parts) < 0.2
    m[empty], total[empty] = -1e30, 0
    o[empty.transpose(1, 2)] = 0
    return [o, m, total]


def whole(sums: list[torch.Tensor], held: slice, at: int, local: int) -> tuple[torch.Tensor, ...]:
    """Sum, largest score and total of a row, in float64."""
    o, m, totals = sums[0][at, held, local].double(), *(x[at, local, held].double() for x in sums[1:])
    largest = m.max() if len(m) else torch.tensor(-1e30, dtype=torch.float64)
    weights = (m - largest).exp2()
    return (weights.unsqueeze(-1) * o).sum(0), largest, (weights * totals).sum()


def expected(
    call: Call,
    sums: list[torch.Tensor],
    dense: list[torch.Tensor],
    bounds: list[tuple[int, int]] | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[heads, rows, Dv] in float64."""
    out = torch.zeros(call.heads, call.rows, call.values.head_dim, dtype=torch.float64)
    for head in range(call.heads):
        for row in range(call.rows):
            at, local = row // call.block, row % call.block
            own = head * call.blocks + at
            held = slice(None) if bounds is None else slice(*bounds[head])
            y, m, total = whole(sums, held, own if bounds is None else at, local)
            z, dense_m, dense_total = whole(dense, slice(None), own, local)
            x = call.values.rotation.inverse(y * call.values.unit)
            parts = [(x, m, total), (z, dense_m, dense_total)]
            if sinks is not None:
                sink = sinks[head % KV_HEADS * GROUP + row // call.queries].double() * LOG2_E
                parts.append((0 * x, sink, torch.ones((), dtype=torch.float64)))
            largest = max(part[1] for part in parts)
            x, total = (sum(part[k] * (part[1] - largest).exp2() for part in parts) for k in (0, 2))
            out[head, row] = x / total if total > 0 else x
    return out


def check(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert bool(got.isfinite().all())
    assert float((got.double() - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize(
    ("dim", "queries", "splits", "tiles", "sinks"),
    [
        (128, 1, 1, 0, False),
        (64, 1, 3, 9, True),
        (256, 5, 16, 17, True),
        (64, 7, 17, 1, False),
        (256, 1, 61, 9, True),
        (128, 1, 129, 17, True),
    ],
)
def test_all_sums_are_joined(dim: int, queries: int, splits: int, tiles: int, sinks: bool) -> None:
    call = call_of(dim, queries)
    count = call.heads * call.blocks
    sums, dense = (sums_of(count, parts, call.block, dim) for parts in (splits, tiles))
    logits = torch.randn(KV_HEADS * GROUP) if sinks else None
    got = call.merge(sums, dense, logits)
    check(got.view(HEADS, call.rows, dim), expected(call, sums, dense, None, logits))


@pytest.mark.usefixtures("_emulated")
@pytest.mark.parametrize(("dim", "queries", "splits"), [(128, 5, 30), (64, 1, 150)])
def test_sums_of_a_schedule(dim: int, queries: int, splits: int) -> None:
    """A head without sums, and one with more than a step takes."""
    call = call_of(dim, queries)
    bounds = [(0, 3), (3, 3), (3, splits - 4), (splits - 4, splits)]
    programs = torch.zeros(splits, 4, dtype=torch.int32)
    call.schedule = PageSchedule(programs, torch.tensor(bounds, dtype=torch.int32))
    call.scheduled_heads = HEADS
    sums = sums_of(call.blocks, splits, call.block, dim)
    dense = sums_of(call.heads * call.blocks, 0, call.block, dim)
    got = call.merge(sums, dense).view(HEADS, call.rows, dim)
    check(got, expected(call, sums, dense, bounds, None))
    assert not got[1].any()


@pytest.mark.usefixtures("_emulated")
def test_sums_of_a_segment_become_one_of_another() -> None:
    call = call_of(128, 3)
    sums = sums_of(HEADS, 20, call.block, 128)
    dense = [torch.full_like(x, torch.nan) for x in sums_of(HEADS, 3, call.block, 128)]
    call.merge(sums, dense, into=1)
    o, m, total = (x[:, : call.rows] for x in (dense[0][:, 1], dense[1][..., 1], dense[2][..., 1]))
    check(o / total.unsqueeze(-1), expected(call, sums, sums_of(HEADS, 0, call.block, 128), None, None))
    assert torch.equal(m, sums[1][:, : call.rows].amax(-1))
    rest = dense[0][:, ::2].isnan().all(), dense[1][..., ::2].isnan().all(), dense[0][:, 1].isnan().any()
    assert all(rest)


@pytest.mark.parametrize(
    ("capability", "dim", "sums", "barriers"), [(80, 256, 61, 1), (90, 128, 128, 1), (100, 64, 3, 0)]
)
def test_warps_meet_once(capability: int, dim: int, sums: int, barriers: int) -> None:
    """And all sums of a step are on their way before the first is used, which takes registers."""
    from quantpress.kernels.attend.merge.by_warps import merge_by_warps_kernel

    parts, warps, size, tiles = warps_of_merge(sums, 4)
    constants = {"DV": dim, "R": 8, "PARTS": parts, "WARPS": warps, "SIZE": size, "TILES": tiles}
    constants |= {"HAS_SINKS": True, "SCHEDULED": dim == 64, "PARTIAL": False}
    groups = dim == 128
    constants |= {"GROUPS": 1 + groups, "SHARED": False, "SLOTS": groups}
    constants |= {} if groups else {"order_ptr": None, "slots_ptr": None}
    constants |= {"CHAINED": capability >= 90, "AHEAD": dim == 128}
    kernel = compiled(merge_by_warps_kernel, constants, capability, warps)
    assert kernel.asm["ptx"].count("bar.sync") == barriers
    assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == (capability >= 90)
    assert ("griddepcontrol.launch_dependents" in kernel.asm["ptx"]) == (capability == 90)
    taken = resources(kernel)
    assert taken["REG"] > (size + tiles) * dim // 32 and taken["STACK"] <= 16
