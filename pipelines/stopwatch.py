"""Seconds of reading, compressing and answering, told apart although presses work inside the forward pass."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from quantpress.presses.models.support import attention_modules


class Stopwatch:
    """Sums seconds by name. It waits for an accelerator at every reading: use it on request only.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = {"prefill": 0.0, "compress": 0.0, "decode": 0.0}
        self._since: float | None = None

    def now(self) -> float:
        """Seconds, once the device has done all that was asked of it."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add what happens inside to `name`, less what `start` and `stop` took for compressing meanwhile."""
        begin, compressed = self.now(), self.seconds["compress"]
        try:
            yield
        finally:
            within = self.seconds["compress"] - compressed
            self.seconds[name] += self.now() - begin - within

    def start(self, *_: Any) -> None:
        """Presses begin: a forward hook on attention modules, registered before theirs."""
        self._since = self.now()

    def stop(self, *_: Any) -> None:
        """Presses are done: a forward hook registered after theirs."""
        if self._since is not None:
            self.seconds["compress"] += self.now() - self._since
            self._since = None

    def hook(self, model: PreTrainedModel, at: str) -> list[RemovableHandle]:
        """Register `start` or `stop` on every attention module."""
        call = getattr(self, at)
        return [module.register_forward_hook(call) for module in attention_modules(model)]
