"""Times of a call on caches that are not in the GPU's L2 cache."""

import math
from collections.abc import Callable
from statistics import median

import torch

COLD = 10
"""The caches read in turn are together this many times as large as the L2 cache."""

ROUNDS = 5


def microseconds(*calls: Callable[[], object], least: int = 32, milliseconds: int = 100) -> float:
    """Median time of one call, from replays in a row of a CUDA graph of at least `least` calls, made in turn.

    Replays take about `milliseconds` in all. The launch of a graph is shared by its calls, as the layers of a
    model share that of a decode step. Nothing clears the L2 cache between replays: `caches` says how many are
    to be read in turn, and what a clearing writes would be written back to memory while the first calls run.
    """
    calls *= math.ceil(least / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _replayed(graph, 2)
    replays = math.ceil(milliseconds * 1000 / ROUNDS / once)
    return median(_replayed(graph, replays) for _ in range(ROUNDS)) / len(calls)


def _replayed(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Microseconds of a replay, of some in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1000 / times


def caches(size: int) -> int:
    """Number of caches of `size` bytes to read in turn, so that little of them stays in the L2 cache."""
    return math.ceil(COLD * torch.cuda.get_device_properties(0).L2_cache_size / size)
