"""Decoding without the host: single-token forwards replay one CUDA graph of the whole model.

A decode step of transformers is a few thousand kernel launches from Python, which takes longer than the
kernels do. Over a cache at fixed addresses (`FixedCache`) every step is the same launches
over the same memory, so they are recorded once and replayed with one call.
"""

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from quantpress.cache.fixed.cache import FixedCache, never_fixable, unfixable
from quantpress.cache.layer import PackedLayer
from quantpress.errors import InvalidInputError
from quantpress.pipelines.capture.captured_forward import CapturedForward
from quantpress.pipelines.capture.single_token import (
    SingleToken,
    copied,
    hides_nothing,
    uncapturable,
    windows_of,
)
from quantpress.presses.models.lock import model_lock
from quantpress.presses.traits import renumbers_positions

WARM_STEPS = 2
"""Steps that run eagerly, at fixed addresses, before the first capture: libraries and kernels load in them,
and short answers never pay for a capture."""

MOST_LOSSES = 3
"""Tokens in a row that find the cache changed since the last one before it is left alone."""


@contextmanager
def captured_decoding(
    model: PreTrainedModel,
    *,
    new_tokens: int | None = None,
    cuda_graph: bool | None = None,
    compile: bool = False,
) -> Iterator["CapturedDecoding"]:
    """While inside, single-token forwards of the model over a cache, packed or not, replay a CUDA graph.

    Everything around them stays as it is: `model.generate` with sampling, stopping criteria, processors and
    streamers. Logits are the caller's own copy. The first two tokens run as always, the third is captured
    (about one forward's time), and so is the next after the cache outgrew its room. Other forwards run as
    always too: several tokens at once, padded batches, caches in which a packed layer has no full page yet.
    Several threads may be inside, each in a context of its own or all in one.
    `DynamicCache`'s own layers, full and sliding, take part with memory of their own. Where a user would
    expect the speed and cannot have it, one warning says why.

    Hooks on parts of the model do not run in a replay; with any, nothing is captured. Do not change or move
    weights inside.

    Args:
        model: decoder-only, on one CUDA device. On the CPU the same steps run eagerly.
        new_tokens: room to make in the cache for that many tokens, when it is first used; more than that make
            room again and capture again. None: a sixteenth more than there are, at least 1024.
        cuda_graph: as everywhere, None: a graph where it can be; True: an error in place of the warning;
            False: never a graph. Here the steps run at fixed addresses all the same.
        compile: run the steps through torch.compile(fullgraph=True) first, which joins the small kernels. It
            takes a minute or so, once for a model and shape; what it raises is handed on.

    Returns:
        A `CapturedDecoding`, which counts what it did.

    Raises:
        InvalidInputError: cuda_graph is True and the model is not on CUDA, or what comes inside rules a graph
            out; cuda_graph is no bool; new_tokens is below 0; compile is True and the model is enabled with a
            press that numbers positions anew, which a compiled step does not see.

    Example:
        >>> # with press(model):
        >>> #     model(context_ids, past_key_values=cache)
        >>> # with captured_decoding(model):
        >>> #     model.generate(**continue_inputs(cache, question_ids), past_key_values=cache)
    """
    if new_tokens is not None and new_tokens < 0:
        raise InvalidInputError(f"new_tokens is {new_tokens}; give 0 or more, or None")
    check_choice(cuda_graph)
    if cuda_graph and model.device.type != "cuda":
        raise InvalidInputError(f"cuda_graph=True, but the model is on {model.device}; move it to CUDA")
    with capturing(model, new_tokens, cuda_graph, compile) as steps:
        yield steps


@contextmanager
def capturing(
    model: PreTrainedModel,
    new_tokens: int | None,
    cuda_graph: bool | None,
    compile: bool,
    shared: bool = True,
) -> Iterator["CapturedDecoding"]:
    """`captured_decoding` of arguments that fit together; `shared` as in `Opened`."""
    if compile:
        _check_compiled(model)
    with model_lock(model):
        forward = CapturedForward.of(model)
        steps = CapturedDecoding(model, forward.original, new_tokens, cuda_graph, compile)
        opened = forward.open(steps, shared)
    try:
        yield steps
    finally:
        with model_lock(model):
            forward.close(opened)
        steps.close()


def _check_compiled(model: PreTrainedModel) -> None:
    """Refuse to compile the steps of a model whose positions an enabled press counts.

    Raises:
        InvalidInputError: as said.
    """
    from quantpress.pipelines.enabling.enable import enabled_press

    press = enabled_press(model)
    if press is not None and renumbers_positions(press):
        raise InvalidInputError(
            f"compile=True, but the model is enabled with {press!r}, which numbers positions anew: a "
            "compiled step would not see them; leave compile out, or disable(model) and read under the press"
        )


def check_choice(cuda_graph: bool | None) -> None:
    """Refuse what is no choice about graphs.

    Raises:
        InvalidInputError: it is not None, True or False.
    """
    if cuda_graph is not None and not isinstance(cuda_graph, bool):
        raise InvalidInputError(f"cuda_graph is {cuda_graph!r}; give True, False or None")


class CapturedDecoding:
    """What `captured_decoding` puts in the place of a model's forward.

    Args:
        model: the model.
        forward: its own forward.
        new_tokens: see `captured_decoding`.
        cuda_graph: as there.
        compile: run the steps through torch.compile.

    Attributes:
        replays: steps that were one launch of a graph.
        captures: graphs made.
        eager_steps: steps at fixed addresses without a graph.
        warned: whether it was said why there is no graph; it is said once.
        may_capture: asked before a graph is made; until it says True, steps run without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: Callable[..., Any],
        new_tokens: int | None,
        cuda_graph: bool | None,
        compile: bool = False,
    ) -> None:
        self.replays = self.captures = self.eager_steps = 0
        self.warned = False
        self.may_capture: Callable[[], bool] = lambda: True
        self._busy = threading.RLock()  # streamers and their like call from several threads
        self._model, self._forward, self._new_tokens = model, forward, new_tokens
        self._capture = model.device.type == "cuda" and cuda_graph is not False
        self._required = cuda_graph is True
        self._step_forward = torch.compile(forward, fullgraph=True, dynamic=False) if compile else forward
        self._signature = inspect.signature(forward)
        self._cache: FixedCache | None = None
        self._addresses: list[int] = []
        self._static: SingleToken | None = None
        self._graph: tuple[torch.cuda.CUDAGraph, Any] | None = None
        self._cold = WARM_STEPS  # steps to run before the next capture
        self._given_up = self._was_step = False
        self._losses = 0
        self._unpadded = -1  # width of the last mask known to hide nothing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        with self._busy:
            return self._step(args, kwargs)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        step = SingleToken.read(self._signature, args, kwargs)
        if step is None or self._given_up or torch.is_grad_enabled() or not self._ready(step):
            self._was_step = False
            if step is None:
                self._unpadded = -1
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
        """Let the cache grow again, and all memory go."""
        with self._busy:
            if self._cache is not None:
                self._cache.release()
            self._cache = self._static = self._graph = None

    def _fixed(self) -> FixedCache:
        assert self._cache is not None
        return self._cache

    def _ready(self, step: SingleToken) -> bool:
        """Whether this step can run at fixed addresses; enters them."""
        ours = self._cache is not None and self._cache.cache is step.cache
        if self._cache is not None and ours and self._cache.entered:
            self._losses = 0
            return self._sees_all(step.mask)
        if unfixable(step.cache) is not None:
            reason = never_fixable(step.cache)
            if reason is not None and any(isinstance(layer, PackedLayer) for layer in step.cache.layers):
                self._warn(reason)  # else it is packed in a while
            return False
        if not self._sees_all(step.mask):
            return False
        self._losses += ours and self._was_step
        if self._losses == MOST_LOSSES:
            return self._give_up("the cache is changed between tokens, as beam search does")
        reason = uncapturable(self._model)
        if reason is not None:
            return self._give_up(reason)
        if self._cache is None or not self._cache.fits(step.cache):
            if self._cache is not None:
                self._cache.release()
            self._graph = None
            self._cache = FixedCache(step.cache, windows_of(self._model))
        self._cache.enter(self._new_tokens)
        self._check_addresses()
        return True

    def _check_addresses(self) -> None:
        addresses = self._fixed().addresses()
        if addresses != self._addresses:
            self._addresses, self._graph = addresses, None

    def _sees_all(self, mask: torch.Tensor | None) -> bool:
        """Whether a mask hides nothing: asks the device once, then trusts a mask that is one token wider."""
        if mask is None:
            return True
        if mask.dim() != 2:
            return False
        if mask.shape[1] != self._unpadded + 1 and not hides_nothing(mask):
            return False
        self._unpadded = mask.shape[1]
        return True

    def _run(self, step: SingleToken) -> Any:
        if self._static is None or not self._static.like(step):
            self._static, self._graph = step.static(self._model), None
        self._static.fill(step)
        if self._graph is None and self._capture and self._cold <= 0 and self.may_capture():
            try:
                self._graph = self._record(self._static)
            except Exception as error:  # whatever the model does that a graph cannot hold
                self._give_up(f"{type(self._model).__name__} cannot be captured ({_first_line(error)})")
                return None
        elif self._graph is not None:
            self._fixed().replayed()
        if self._graph is None:
            self._cold -= 1
            self.eager_steps += 1
            with self._fixed().step():
                return self._step_forward(**self._static.arguments())
        graph, output = self._graph
        graph.replay()
        self.replays += 1
        return copied(output)

    def _record(self, static: SingleToken) -> tuple[torch.cuda.CUDAGraph, Any]:
        """Capture a step. Nothing runs yet, but the host has counted it."""
        fixed = self._fixed()
        counts = fixed.counts()
        graph = torch.cuda.CUDAGraph()
        try:
            device = self._model.device
            stream = _capture_stream(device)  # streamers have threads of their own
            recording = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
            before = torch.cuda.stream(torch.cuda.current_stream(device))  # a failed capture leaves its own
            with torch.cuda.device(device), before, recording, fixed.step():
                output = self._step_forward(**static.arguments())
        except BaseException:
            fixed.recount(counts)
            raise
        self.captures += 1
        self._cold = 1  # kernels for a cache that grew may still have to load
        return graph, output

    def _give_up(self, reason: str) -> bool:
        self._given_up, self._graph = True, None
        if self._cache is not None:
            self._cache.release()
        self._warn(reason)
        return False

    def _warn(self, reason: str) -> None:
        if self._required:
            raise InvalidInputError(f"cuda_graph=True, but {reason}; leave cuda_graph out")
        if not self.warned:
            self.warned = True
            warnings.warn(f"decoding runs without a CUDA graph, which is slower: {reason}", stacklevel=2)


@functools.lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: torch keeps one, of whichever was current at the first capture of the process."""
    return torch.cuda.Stream(device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
