"""When each new token of an answer came, and how much memory that took."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
from transformers.generation.streamers import BaseStreamer

SAMPLING_S = 0.005


class TokenClock(BaseStreamer):
    """A streamer that notes the host's time at each new token, and which it is; one answer after another.

    Attributes:
        times: of each answer, seconds of `time.perf_counter` at each new token.
        tokens: of each answer, the ids.
    """

    def __init__(self) -> None:
        self.times: list[list[float]] = []
        self.tokens: list[list[int]] = []
        self._prompted = False

    def put(self, value: torch.Tensor) -> None:
        """`generate` hands in the prompt first, then token after token."""
        if not self._prompted:
            self._prompted = True
            self.times.append([])
            self.tokens.append([])
            return
        self.tokens[-1] += value.flatten().tolist()  # waits for the device
        self.times[-1].append(time.perf_counter())

    def end(self) -> None:
        """The answer is complete."""
        self._prompted = False


class PeakMemory:
    """The most memory in use between two points, over what was in use at the first.

    Attributes:
        bytes: on CUDA devices what torch has allocated, exactly; of several, the sum of each one's most.
            Elsewhere what the process has resident, looked at every 5 milliseconds.
    """

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def peak_memory(*devices: torch.device) -> Iterator[PeakMemory]:
    """Watch the memory of CUDA devices, or of this process, while inside.

    Args:
        *devices: where the work is done. Others than CUDA's do not count beside one of CUDA's.
    """
    found = PeakMemory()
    on_gpu = {device for device in devices if device.type == "cuda"}
    if on_gpu:
        for device in on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = sum(map(torch.cuda.memory_allocated, on_gpu))
        try:
            yield found
        finally:
            found.bytes = sum(map(torch.cuda.max_memory_allocated, on_gpu)) - before
        return
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    most = before

    def watch() -> None:
        nonlocal most
        while not done.wait(SAMPLING_S):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.bytes = max(most, process.memory_info().rss) - before
