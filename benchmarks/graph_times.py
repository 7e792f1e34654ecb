"""Times of a call on caches that are not in the GPU's L2 cache."""

import math
from collections.abc import Callable

import torch
import triton

COLD = 4
"""The caches read in turn are together this many times as large as the L2 cache."""


def microseconds(*calls: Callable[[], object], least: int = 10, milliseconds: int = 100) -> float:
    """Median time of one call, from replays of a CUDA graph of at least `least` calls, made in turn.

    Replays take about `milliseconds` in all.
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
    median = triton.testing.do_bench(graph.replay, warmup=20, rep=milliseconds, return_mode="median")
    return float(median) * 1000 / len(calls)


def caches(size: int) -> int:
    """Number of caches of `size` bytes to read in turn, so that little of them stays in the L2 cache."""
    return math.ceil(COLD * torch.cuda.get_device_properties(0).L2_cache_size / size)
