"""What is measured of a run: when each new token came, how much memory it took, and on which machine."""

import ctypes
import ctypes.util
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import Pipeline
from transformers.generation.streamers import BaseStreamer

from quantpress.pipelines.default_model import DEFAULT_MODEL_NAME

SAMPLING_S = 0.005


class TokenClock(BaseStreamer):
    """A streamer that notes every new token and when it came, one answer after another.

    Attributes:
        times: for each answer, `time.perf_counter()` at each new token, in seconds.
        tokens: for each answer, the ids of its tokens.
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
        bytes: on CUDA devices what torch has allocated, exactly; of several, the sum of their peaks.
            Elsewhere the resident memory of the process, sampled every 5 milliseconds.
    """

    def __init__(self) -> None:
        self.bytes = 0


@contextmanager
def peak_memory(*devices: torch.device) -> Iterator[PeakMemory]:
    """Watch the memory of CUDA devices, or of this process, while inside.

    Args:
        *devices: where the work is done. Where one of them is a CUDA device, only CUDA devices count.
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


def give_back_memory(device: torch.device) -> None:
    """Return freed memory to the system; held by the allocator, it would hide what the next run takes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    library = ctypes.util.find_library("c")
    trim = getattr(ctypes.CDLL(library), "malloc_trim", None) if library else None
    if trim is not None:  # glibc
        trim(0)


def devices_of(pipe: Pipeline) -> list[torch.device]:
    """The devices that hold the model's weights; `pipe.device` may be "cuda" without a number."""
    held = (weight.device for weight in pipe.model.parameters() if not weight.is_meta)
    return list(dict.fromkeys(held)) or [pipe.device]


def device_names(pipe: Pipeline) -> str:
    """The GPUs that a model is on, such as "2 x NVIDIA H200"; without a GPU, the type of its device."""
    names = Counter(torch.cuda.get_device_name(one) for one in devices_of(pipe) if one.type == "cuda")
    shown = (f"{count} x {name}" if count > 1 else name for name, count in names.items())
    return " + ".join(shown) or str(pipe.device.type)


def machine(pipe: Pipeline) -> dict[str, Any]:
    """Device, dtype, threads and versions that a pipeline runs with, to stand beside its figures."""
    return {
        "device": device_names(pipe),
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def model_name(pipe: Pipeline) -> str:
    """The name of a pipeline's model, for a report."""
    name = str(pipe.model.config.name_or_path)
    return DEFAULT_MODEL_NAME if Path(name).name == DEFAULT_MODEL_NAME else name
