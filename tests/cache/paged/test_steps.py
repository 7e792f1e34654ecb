"""Steps of paged attention at fixed addresses: called, interpreted, on CUDA, and captured in a CUDA graph."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress.cache import PagedAttention
from tests.cache.paged.paging import QUERY_HEADS, dense, exact, random_states, relative_error, small
from tests.gpu.gpu_state import no_synchronization
from tests.kernels.interpreter import interpret

Step = Callable[[], torch.Tensor]


@pytest.mark.slow
def test_kernels_read_the_pool() -> None:
    """The plain kernels in Triton's interpreter, on what `attend` gives them."""
    pytest.importorskip("triton")
    found = json.loads(interpret(str(Path(__file__).parent / "interpret.py")).splitlines()[-1])
    assert len(found) == 4 and max(found) < 1e-4, found


def called(step: Step) -> Step:
    return step


def captured(step: Step) -> Step:
    """The step as a CUDA graph; its inputs and outputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and tables are made before
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def steps_pool(bits: Any, **options: Any) -> PagedAttention:
    return small(64, bits=bits, layers=2, recent_tokens=16, max_sequences=4, max_tokens=2000, **options)


def run_steps(make: Callable[[Step], Step], paged: PagedAttention, steps: int, limit: float) -> None:
    """Decode steps of a batch whose sequences pack pages, fork and are replaced in between."""
    for tokens in (700, 3, 140, 0):
        paged.add(*random_states(paged, 2, tokens=tokens))
    inputs = [random_states(paged, 4, tokens=1) for _ in range(2)]
    query = torch.randn(4, QUERY_HEADS, 1, 64).to(paged.device, paged.pool.dtype)

    def step() -> torch.Tensor:
        plan = paged.plan()
        outputs = []
        for layer, (keys, values) in enumerate(inputs):
            paged.write(keys, values, plan, layer=layer)
            outputs.append(paged.attend(query, plan, layer=layer))
        return torch.stack(outputs)

    paged.extend()
    run = make(step)
    before = sum(t.nbytes for t in paged.pool.packed_tensors() + paged.pool.dense_tensors())
    for count in range(steps):
        if count:
            paged.extend()
            for old in (*inputs[0], *inputs[1], query):
                old.copy_(torch.randn_like(old))
        got = run()
        if count in (0, 1, 8, 9, 10, 146, 147, steps // 2 + 1, steps - 1):  # of 140 tokens, 149 make a page
            for layer in range(2):
                for row in paged.sequences:
                    expected = exact(query[row], *dense(paged, row, layer))
                    assert relative_error(got[layer, row], expected) < limit
            for layer, states in enumerate(inputs):  # the newest token of every sequence is in place
                for side, new in zip(dense(paged, 1, layer), states, strict=True):
                    assert torch.equal(side[:, -1], new[1, :, 0].double())
        if count == steps // 2:  # addresses stay while sequences come and go
            paged.free(0)
            assert paged.fork(2) == 0
            paged.free(3)
            assert paged.add(*random_states(paged, 2, tokens=400)) == 3
    pages = [paged.blocks_for(paged.length(row)) for row in range(4)]
    assert paged.page_counts.tolist() == pages and pages[2] > 0
    assert before == sum(t.nbytes for t in paged.pool.packed_tensors() + paged.pool.dense_tensors())


def test_steps() -> None:
    run_steps(called, steps_pool(4), 30, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 3, (4, 2), 2.5, 8], ids=str)
def test_captured_steps(bits: Any, dtype: torch.dtype) -> None:
    """One graph serves every length, also where the kernels do not cover the widths."""
    paged = steps_pool(bits, device="cuda", dtype=dtype)
    run_steps(captured, paged, 200, 2e-3 if dtype == torch.float32 else 6e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 3, 2, (3, 2), 2.5], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_cuda_is_the_cpu(queries: int, bits: Any) -> None:
    """The same calls give the same tables, and attention within what ties of codes move."""
    pools, states = [], None
    for device in ("cpu", "cuda"):
        paged = small(128, bits=bits, device=device, layers=2)
        states = states or [random_states(paged, 2, tokens=tokens) for tokens in (1000, 7, 389)]
        sequences = [paged.add(*(s.to(device) for s in pair)) for pair in states]
        paged.fork(sequences[0])
        paged.append([0, 2], *(s[:, None, :, :300].repeat(1, 2, 1, 1, 1).to(device) for s in states[0]))
        paged.free(1)
        pools.append(paged)
    for name in ("block_tables", "context_lens", "page_counts"):
        assert torch.equal(getattr(pools[0], name), getattr(pools[1], name).cpu())
    query, order = torch.randn(3, QUERY_HEADS, queries, 128), [3, 0, 2]
    for layer in range(2):
        got = [paged.attend(query.to(paged.device), order, layer=layer).cpu() for paged in pools]
        assert relative_error(got[1], got[0].double()) < 1e-2
        for row, sequence in enumerate(order):
            expected = exact(query[row], *(s.cpu() for s in dense(pools[1], sequence, layer)))
            assert relative_error(got[1][row], expected) < 2e-3


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_device() -> None:
    paged = small(128, bits=3, device="cuda", dtype=torch.bfloat16)
    for tokens in (700, 3):
        paged.add(*random_states(paged, tokens=tokens))
    keys, values = random_states(paged, 6, tokens=1)
    query = torch.randn(6, QUERY_HEADS, 1, 128, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        plan = paged.plan()
        paged.write(keys, values, plan)
        paged.attend(query, plan)

    paged.extend()
    step()  # kernels are compiled
    torch.cuda.synchronize()
    with no_synchronization():
        paged.extend()
        step()


@pytest.mark.gpu
def test_memory_is_taken_once() -> None:
    paged = PagedAttention(256, 8, query_heads=8, kv_heads=2, head_dim=128, bits=3, layers=4, device="cuda")
    for tokens in (3000, 500, 1):
        paged.add(*random_states(paged, 4, tokens=tokens))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(30):
        paged.append([0, 1, 2], *random_states(paged, 4, 3, tokens=20))
    paged.free(paged.fork(1))
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
