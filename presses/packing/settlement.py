"""Checks of all layers of a prefill that are settled together, at the end of the decoder's forward.

A check that reads a number in every layer makes the host wait for the device, layer by layer, and then the
device for the host. Inside a decoder's forward, packing therefore only collects its checks.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from quantpress.cache.layer import PackedLayer
from quantpress.deferred import DeferredChecks

MOST_HELD_BYTES = 1 << 26
"""How many more bytes scales in float32 may take while they wait for their verdict."""


class Settlement(threading.local):
    """The checks of the forward that runs in this thread, and the layers that it has packed."""

    def __init__(self) -> None:
        self._checks: DeferredChecks | None = None
        self._layers: list[PackedLayer] = []

    @contextmanager
    def at_end_of(self, decoder: nn.Module) -> Iterator[None]:
        """While inside, a forward of the decoder ends with the verdicts on the layers packed in it.

        An error is raised before other hooks take the forward for finished, so that its cache is undone.
        """
        handles = [
            decoder.register_forward_pre_hook(self._begin),
            decoder.register_forward_hook(self._end, prepend=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._reset(None)

    def collecting(self) -> AbstractContextManager[None]:
        """Inside, checks are collected; outside a forward they are made at once."""
        return nullcontext() if self._checks is None else self._checks.collecting()

    def add(self, layer: PackedLayer) -> None:
        """A layer was packed; settles the checks so far when they hold much memory."""
        if self._checks is not None:
            self._layers.append(layer)
            if self._checks.held_bytes > MOST_HELD_BYTES:
                self._settle(self._checks)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._reset(DeferredChecks())

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        checks = self._checks
        if checks is not None:
            self._settle(checks)
        self._reset(None)

    def _settle(self, checks: DeferredChecks) -> None:
        layers = self._layers
        self._reset(DeferredChecks())
        checks.settle()
        for layer in layers:
            if layer.tokens is not None:
                layer.tokens.narrow(checks.narrowed)

    def _reset(self, checks: DeferredChecks | None) -> None:
        self._checks, self._layers = checks, []
