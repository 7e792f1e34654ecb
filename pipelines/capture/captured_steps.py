"""Decode steps over one cache: the first ones run, then one is captured, and the others replay it."""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from quantpress.cache.attention.causal import left_padding
from quantpress.cache.fixed.cache import FixedCache
from quantpress.cache.layer import PackedLayer
from quantpress.pipelines.capture.eligibility import JoinKernels, refuse, why_not
from quantpress.pipelines.capture.single_token import SingleToken, copied
from quantpress.pipelines.joined.piece import MANY_ROWS
from quantpress.pipelines.joined.step import JoinedStep, joined_reading
from quantpress.presses.models.attention import attention_modules, is_sliding, window_of

WARM_STEPS = 2
"""Steps that run eagerly at fixed addresses before the first capture. Libraries and kernels load in them, and
short answers never pay for a capture."""


class CapturedDecoding:
    """Takes the place of a model's forward, and runs single-token forwards as replays of a CUDA graph.

    Args:
        model: the model.
        forward: the model's own forward.
        new_tokens: see `captured_decoding`.
        cuda_graph: see `captured_decoding`.
        compile: run the steps through torch.compile.
        join_kernels: see `captured_decoding`.

    Attributes:
        replays: number of steps that replayed a graph.
        captures: number of graphs made.
        eager_steps: number of steps that ran at fixed addresses without a graph.
        joined: how many norms, activations, products (linear layers) and functions for rotary positions the
            last graph has as kernels of ours.
        warned: whether the one warning that there is no graph was given.
        may_capture: asked before each capture; while it returns False, steps run without a graph.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        new_tokens: int | None,
        cuda_graph: bool | None,
        compile: bool = False,
        join_kernels: JoinKernels = True,
    ) -> None:
        self.replays = self.captures = self.eager_steps = 0
        self.joined: dict[str, int] = {}
        self.warned = False
        self.may_capture: Callable[[], bool] = lambda: True
        self._busy = threading.RLock()  # streamers and the like call from several threads
        self._model, self._forward, self._new_tokens = model, forward, new_tokens
        self._capture = model.device.type == "cuda" and cuda_graph is not False
        self._cuda_graph = cuda_graph
        self._step_forward = torch.compile(forward, fullgraph=True, dynamic=False) if compile else forward
        self._reads_joined = bool(join_kernels) and not compile
        joins = self._capture and join_kernels and not compile
        self._joins = JoinedStep(model, forward, join_kernels is True) if joins else None
        self._signature = inspect.signature(forward)
        self._cache: FixedCache | None = None
        self._addresses: list[int] = []
        self._static: SingleToken | None = None
        self._graph: tuple[torch.cuda.CUDAGraph, Any] | None = None
        self._eager_left = WARM_STEPS  # steps to run eagerly before the next capture
        self._given_up = self._was_step = False
        self._changes = 0
        self._seen = -1  # width of the last mask that was looked at
        self._padding: torch.Tensor | None = None  # what it hides in front of each sequence

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        with self._busy:
            return self._step(args, kwargs)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = SingleToken.read(self._signature, args, kwargs)
        eligible = step is not None and not self._given_up and not why_not(gradients=torch.is_grad_enabled())
        if step is None or not eligible or not self._enter(step):
            self._was_step = False
            if step is None:
                self._seen = -1
                if self._reads_joined and _tokens(args, kwargs) >= MANY_ROWS:
                    with joined_reading(self._model, self._forward):
                        return self._forward(*args, **kwargs)
            return self._forward(*args, **kwargs)
        self._was_step = True
        try:
            output = self._run(step)
            if output is None:  # cannot be captured
                return self._forward(*args, **kwargs)
            if self._fixed().flush():
                self._check_addresses()
        except BaseException:
            self._was_step = False
            self._fixed().release()
            raise
        return output

    def close(self) -> None:
        """Let the cache grow again, and free the memory of graphs and steps."""
        with self._busy:
            if self._cache is not None:
                self._cache.release()
            self._cache = self._static = self._graph = None

    def _fixed(self) -> FixedCache:
        assert self._cache is not None
        return self._cache

    def _enter(self, step: SingleToken) -> bool:
        """Bring the cache to its fixed addresses; False if this step cannot run there."""
        known = self._cache is not None and self._cache.cache is step.cache
        if self._cache is not None and known and self._cache.entered:
            self._changes = 0
            return self._reads(step) and self._pad()
        self._seen = -1  # the cache is another one, or was changed: its mask may hide other tokens
        if why_not(cache=step.cache):
            reasons = why_not(cache=step.cache, lasting=True)
            if reasons and any(isinstance(layer, PackedLayer) for layer in step.cache.layers):
                self._warn(reasons)
            return False
        if not self._reads(step):
            return False
        self._changes += known and self._was_step
        shared = self._model, step.cache
        if reasons := why_not(changes=self._changes, model=self._model, shared=shared):
            self._give_up(reasons)
            return False
        self._fix(step.cache)
        return self._pad()

    def _fix(self, cache: Cache) -> None:
        if self._cache is None or not self._cache.fits(cache):
            if self._cache is not None:
                self._cache.release()
            self._graph = None
            self._cache = FixedCache(cache, _windows(self._model))
        self._cache.enter(self._new_tokens)
        self._check_addresses()

    def _check_addresses(self) -> None:
        """Drop the graph if anything that it reads or writes has moved."""
        addresses = self._fixed().addresses()
        if addresses != self._addresses:
            self._addresses, self._graph = addresses, None

    def _reads(self, step: SingleToken) -> bool:
        """Whether steps can hide what the mask hides.

        A mask one token wider than the last is trusted without a look.
        """
        mask = step.mask
        if mask is None:
            self._padding = None
            return True
        if mask.dim() == 2 and mask.shape[1] == self._seen + 1:
            self._seen += 1
            return True
        if why_not(mask=mask):
            return False
        found = left_padding(mask, 1, mask.shape[1])
        padding = found.starts if found is not None and found.most else None
        if padding is not None and why_not(padded=(mask, step.cache)):
            return False
        self._seen, self._padding = mask.shape[1], padding
        return True

    def _pad(self) -> bool:
        """Hide the padding from the next step; always True."""
        if self._fixed().pad(self._padding):
            self._graph = None
        return True

    def _run(self, step: SingleToken) -> Any:
        if self._static is None or not self._static.like(step):
            self._static, self._graph = step.static(self._model), None
        self._static.fill(step)
        if self._graph is None and self._capture and self._eager_left <= 0 and self.may_capture():
            try:
                self._graph = self._record(self._static)
            except Exception as error:  # whatever the model does that a graph cannot hold
                self._give_up([f"{type(self._model).__name__} cannot be captured ({_first_line(error)})"])
                return None
        elif self._graph is not None:
            self._fixed().replayed()
        if self._graph is None:
            self._eager_left -= 1
            self.eager_steps += 1
            watched = nullcontext() if self._joins is None or self._eager_left else self._joins.watching()
            with self._fixed().step(), watched:
                return self._step_forward(**self._static.arguments())
        graph, output = self._graph
        graph.replay()
        self.replays += 1
        return copied(output)

    def _record(self, static: SingleToken) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Capture a step. The device runs nothing yet, but the host has counted the token."""
        fixed = self._fixed()
        counts = fixed.counts()
        graph = torch.cuda.CUDAGraph()
        try:
            device = self._model.device
            stream = _capture_stream(device)
            recording = torch.cuda.graph(  # streamers run in threads of their own
                graph, stream=stream, capture_error_mode="thread_local"
            )
            before = torch.cuda.stream(torch.cuda.current_stream(device))  # a failed capture leaves its own
            joining = nullcontext() if self._joins is None else self._joins.joining()
            with torch.cuda.device(device), before, joining, recording, fixed.step():
                output = self._step_forward(**static.arguments())
        except BaseException:
            fixed.recount(counts)
            raise
        self.captures += 1
        self.joined = {} if self._joins is None else self._joins.joined
        self._eager_left = 1  # kernels for a cache that grew may still have to load
        return graph, output

    def _give_up(self, reasons: list[str]) -> None:
        self._given_up, self._graph = True, None
        if self._cache is not None:
            self._cache.release()
        self._warn(reasons)

    def _warn(self, reasons: list[str]) -> None:
        refuse(reasons, self._cuda_graph)
        if not self.warned:
            self.warned = True
            said = ", and ".join(reasons)
            warnings.warn(f"decoding runs without a CUDA graph, which is slower: {said}", stacklevel=2)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of a forward that is given ids; 0 if it is not."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids.numel() if isinstance(ids, torch.Tensor) else 0


def _windows(model: PreTrainedModel) -> dict[int, int]:
    """The number of tokens that a query sees, itself included, by index of the sliding-window layers."""
    windows: dict[int, int] = {}
    for module in filter(is_sliding, attention_modules(model)):
        index: int = module.layer_idx  # type: ignore[assignment]
        window = window_of(module)
        if window is not None:
            windows[index] = window
    return windows


@functools.lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device. torch keeps a single one, on the device of the first capture of the process."""
    return torch.cuda.Stream(device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
