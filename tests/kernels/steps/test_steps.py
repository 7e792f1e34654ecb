"""The plan of a decode step: the kernel in the interpreter, compiled, and on a GPU, against plain PyTorch."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from quantpress.kernels.steps import BlockMaps, StepBuffers, StepRequests, begin_blocks, plan_decodes
from quantpress.kernels.steps.reference import plan_decodes_reference
from tests.kernels.interpreter import interpret
from tests.kernels.triton_cases import compile_only, more

SINKS, PAGES, STEP, SPARE = 4, 12, 7, 3
KINDS = ("inside", "fills", "crosses", "begins", "new", "idle", "dummy", "shares", "no newest")
CASES = [(1, 1, 0), (9, 1, 0), (9, 4, 0), (20, 1, 2), (18, 4, 2)]  # decodes, queries, prefills


def length_of(kind: str, count: int) -> int:
    """Tokens of a request, `count` of them new, of which a row of the table holds the blocks."""
    full = 128 * random.randrange(2, PAGES - 4)
    lengths = {
        "inside": full + 60,
        "fills": full,
        "crosses": full + max(1, count - 2),
        "begins": full + count,
        "new": count,
        "idle": 0,
        "dummy": full + 60,
        "shares": 0,
        "no newest": full + max(1, count - 2),
    }
    return lengths[kind]


def requests(decodes: int, queries: int, prefills: int) -> StepRequests:
    """Decodes of all kinds and pieces of prompts; a table is 0 behind the blocks that a request has."""
    rows = decodes + prefills
    kinds = [KINDS[row % len(KINDS)] for row in range(decodes)] + ["inside"] * prefills
    counts = [queries if row < decodes else random.randrange(150, 400) for row in range(rows)]
    lengths = [length_of(kind, count) for kind, count in zip(kinds, counts, strict=True)]
    for row in range(decodes, rows):
        lengths[row] = counts[row] + random.choice([0, 128, 200])
    for row, kind in enumerate(kinds):
        if kind == "shares":  # see below
            lengths[row] = (lengths[row - 4] - 1) // 128 * 128 - 98
    counts = [0 if kind == "idle" else count for kind, count in zip(kinds, counts, strict=True)]
    table = torch.randperm(rows * PAGES).add(1).int().view(rows, PAGES)
    for row, kind in enumerate(kinds):
        if kind == "shares":  # the page of its newest block but one is taken in this step
            shared = lengths[row] // 128
            table[row, :shared] = table[row - 4, :shared]
        table[row, -(-lengths[row] // 128) :] = 0
        if kind == "dummy":
            table[row] = 0
        if kind == "no newest":
            table[row, (lengths[row] - 1) // 128] = 0
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    slots = torch.randperm(rows + SPARE)[:rows]
    lengths_ = torch.tensor(lengths, dtype=torch.int32)
    return StepRequests(starts, lengths_, table, slots, decodes, queries, STEP, uniform=True)


def maps(of: StepRequests) -> BlockMaps:
    """What earlier steps left: the requests' own pages and entries, some lost, some taken by others."""
    assert of.slots is not None
    rows, blocks = len(of.slots), of.block_table.numel() + 1
    sizes = (blocks, 2 * (rows + SPARE), blocks, 2 * rows, 2 * rows)
    found = BlockMaps(*(torch.full((size + 1,), -1, dtype=torch.int32) for size in sizes), sinks=SINKS)
    for row, slot in enumerate(of.slots.tolist()):
        before = int(of.lengths[row] - of.starts.diff()[row])
        for number in {max(0, (before - 1) // 128 - 1), max(0, before - 1) // 128}:
            block, page = int(of.block_table[row, number]), 2 * slot + number % 2
            if block and found.page_of[block] < 0 and random.random() < 0.8:
                found.page_of[block] = page
                if random.random() < 0.8:
                    found.block_of[page] = block
        first = int(of.block_table[row, 0])
        if first and random.random() < 0.8:
            found.entry_of[first] = row
            found.first_of[row] = first if random.random() < 0.8 else blocks - 1
    return found


def moved(one: Any, device: str) -> Any:
    """A copy of a dataclass with its tensors on a device."""
    parts = {name: getattr(one, name) for name in one.__dataclass_fields__}
    return type(one)(**{k: v.to(device, copy=True) if isinstance(v, Tensor) else v for k, v in parts.items()})


def check(decodes: int, queries: int, prefills: int, heads: int, device: str, compact: bool) -> None:
    """The kernel leaves the maps, and writes the buffers, exactly as plain PyTorch does."""
    from quantpress.kernels.steps.triton_steps import plan_decodes_triton, supports_plan

    of = requests(decodes, queries, prefills)
    expected = maps(of)
    got, on_device = moved(expected, device), moved(of, device)
    steps = (heads, 1) if compact else (1, expected.blocks)
    buffers = [
        StepBuffers(decodes + 2, heads, PAGES + 1, torch.device(place), steps) for place in ("cpu", device)
    ]
    written = begin_blocks(expected, of)
    plan_decodes_reference(expected, of, buffers[0], written)
    for row, head in ((0, 0), (decodes - 1, heads - 1)):
        wanted = of.block_table[row] * steps[0] + head * steps[1]
        assert torch.equal(buffers[0].table[row, head, :PAGES], wanted)
    assert supports_plan(on_device)
    if device == "cpu":
        assert torch.equal(plan_decodes_triton(got, on_device, buffers[1]), written)
    else:
        assert torch.equal(plan_decodes(got, on_device, buffers[1]).cpu(), written)
    for name in ("page_of", "block_of", "entry_of", "first_of", "used"):
        assert torch.equal(getattr(got, name)[:-1].cpu(), getattr(expected, name)[:-1]), name
    for name, tensor in vars(buffers[0]).items():
        if isinstance(tensor, Tensor) and name != "written":
            assert torch.equal(getattr(buffers[1], name).cpu(), tensor), name
    for one, other in zip(*(buffer.of_tokens(decodes * queries) for buffer in buffers), strict=True):
        assert torch.equal(other.cpu(), one)
    if decodes >= 18:  # nothing of this is equal because it is empty
        out = buffers[0]
        parts = (out.full_blocks + 1, out.sink_lengths, out.packed_lengths, written + 1, expected.used + 1)
        assert all(part.any() for part in parts)


def test_requests_that_the_kernel_does_not_take() -> None:
    """Without slots, or with decodes of several lengths, plain PyTorch makes the plan."""
    from dataclasses import replace

    pytest.importorskip("triton")
    from quantpress.kernels.steps.triton_steps import MOST_REQUESTS, supports_plan

    of = requests(9, 4, 0)
    assert supports_plan(of)
    assert not supports_plan(replace(of, slots=None))
    assert not supports_plan(replace(of, uniform=False, rows=torch.arange(35)))
    assert not supports_plan(replace(of, lengths=torch.zeros(MOST_REQUESTS + 1, dtype=torch.int32)))


def test_interpreted() -> None:
    pytest.importorskip("triton")
    assert interpret(__file__).splitlines() == [str(case) for case in CASES]


@pytest.mark.parametrize(
    ("rows", "of_block", "capability"), [(16, 1, 80), more(1024, 8, 80), more(16, 1, 90), (1024, 8, 100)]
)
def test_compiles(rows: int, of_block: int, capability: int) -> None:
    pytest.importorskip("triton")
    from quantpress.kernels.steps.triton_kernel import plan_decodes_kernel

    numbers: dict[str, Any] = {"RECENT": 128, "OF_BLOCK": of_block, "HEADS": 8, "ROWS": rows, "PAGES": 1024}
    for name in plan_decodes_kernel.arg_names:
        wide = name in ("slots_ptr", "written_ptr")
        empty = torch.empty(1, dtype=torch.int64 if wide else torch.int32)
        numbers.setdefault(name, empty if name.endswith("_ptr") else 7)
    compiled = compile_only(plan_decodes_kernel, numbers, capability, 4 if rows <= 512 else 8)
    assert compiled.asm["cubin"] and "bar.sync" in compiled.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (300, 1, 5), (1000, 4, 0), (1024, 1, 0)], ids=str)
def test_on_a_gpu(case: tuple[int, int, int]) -> None:
    check(*case, heads=8, device="cuda", compact=case[1] > 1)


if __name__ == "__main__":
    random.seed(0)
    for case in CASES:
        for heads in (1, 3):
            check(*case, heads=heads, device="cpu", compact=False)
        check(*case, heads=3, device="cpu", compact=True)
        print(case)
