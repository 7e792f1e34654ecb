"""Decoding without the host: single-token forwards replay one CUDA graph of the whole model.

A decode step of transformers launches a few thousand kernels from Python, which takes longer than the kernels
do. Over a cache at fixed addresses (`FixedCache`) every step makes the same launches over the same memory, so
they are recorded once and replayed with one call.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from quantpress.errors import InvalidInputError
from quantpress.pipelines.capture.captured_steps import CapturedDecoding
from quantpress.pipelines.capture.eligibility import JoinKernels, check_choice, refuse, why_not
from quantpress.pipelines.method_replacement import MethodReplacement
from quantpress.pipelines.press_argument import enabled_press
from quantpress.presses.models.lock import model_lock


@contextmanager
def captured_decoding(
    model: PreTrainedModel,
    *,
    new_tokens: int | None = None,
    cuda_graph: bool | None = None,
    compile: bool = False,
    join_kernels: JoinKernels = True,
) -> Iterator[CapturedDecoding]:
    """While inside, single-token forwards of the model over a cache, packed or not, replay a CUDA graph.

    Nothing else changes: `model.generate` works with sampling, stopping criteria, processors and streamers,
    and logits are the caller's own copy. The first two tokens run without a graph. The third is captured,
    which takes about as long as one forward, and so is the next token after the cache has outgrown its
    capacity. Other forwards run without a graph: several tokens at once, batches padded in other ways than
    on the left, and caches in which a packed layer has no full page yet. docs/limits.md lists everything that
    rules a graph out. Where speed could be expected and cannot be had, one warning says why.

    Several threads may be inside, each in a context of its own or all in one. `DynamicCache`'s own layers,
    full and sliding, take part, in memory of their own.

    Hooks on parts of the model do not run in a replay; if there are any, nothing is captured. Do not change
    or move weights inside.

    Args:
        model: a decoder-only model on one CUDA device. On the CPU the same steps run eagerly.
        new_tokens: how many more tokens the cache can hold when it is first used. Further tokens make more
            capacity and another capture. None: a sixteenth of the tokens that it holds, at least 1024.
        cuda_graph: None uses a graph where possible. True raises an error instead of the warning. False never
            makes a graph; here the steps still run at fixed addresses.
        compile: first run the steps through torch.compile(fullgraph=True), which fuses the small kernels. It
            takes about a minute, once for each model and shape. Its errors are not caught.
        join_kernels: in the graph, kernels of ours stand in for those of PyTorch. The step before the first
            capture compares each with the model's own code. "exact": one kernel for each norm, for rotary
            positions and for the product of a gate, where PyTorch launches two to ten, and only where the
            results are equal to the last bit. True: also linear layers in float16 or bfloat16 at a batch of
            one or two, where the error against float64 is no larger than PyTorch's. Their sums are added
            in another order, so logits differ by roundings, as they do in PyTorch between batch sizes.
            False, and compile=True: the model's own kernels. In the same way forwards over 512 tokens and
            more have the kernels of "exact", with a graph or without one.

    Returns:
        A `CapturedDecoding`, which counts what it did.

    Raises:
        InvalidInputError: cuda_graph is True and the model is not on CUDA, or something inside rules a graph
            out; cuda_graph, compile or join_kernels is none of its values; new_tokens is below 0; compile is
            True and the model is enabled with a press that numbers positions anew, which a compiled step does
            not see.

    Example:
        >>> # with press(model):
        >>> #     model(context_ids, past_key_values=cache)
        >>> # with captured_decoding(model):
        >>> #     model.generate(**continue_inputs(cache, question_ids), past_key_values=cache)
    """
    if new_tokens is not None and new_tokens < 0:
        raise InvalidInputError(f"new_tokens is {new_tokens}; give 0 or more, or None")
    check_choice(cuda_graph, compile, join_kernels)
    refuse(why_not(device=model.device), cuda_graph)
    with capturing(model, new_tokens, cuda_graph, compile, join_kernels) as steps:
        yield steps


@contextmanager
def capturing(
    model: PreTrainedModel,
    new_tokens: int | None,
    cuda_graph: bool | None,
    compile: bool,
    join_kernels: JoinKernels,
    shared: bool = True,
) -> Iterator[CapturedDecoding]:
    """`captured_decoding` with arguments that were checked; `shared` as for `_Opened`."""
    if compile:
        refuse(why_not(compiled_under=enabled_press(model)), None, compile)
    with model_lock(model):
        forward = CapturedForward.of(model)
        steps = CapturedDecoding(model, forward.original, new_tokens, cuda_graph, compile, join_kernels)
        opened = forward.open(steps, shared)
    try:
        yield steps
    finally:
        with model_lock(model):
            forward.close(opened)
        steps.close()


@dataclass(frozen=True, eq=False)
class _Opened:
    """A `captured_decoding` that this thread opened; `shared`: forwards of other threads go to it too."""

    steps: Callable[..., Any]
    thread: threading.Thread
    shared: bool


class CapturedForward(MethodReplacement):
    """Takes the place of a model's forward while any `captured_decoding` is open.

    A forward goes to the steps that its own thread opened last. If its thread has opened none, it goes to the
    shared steps opened last, unless the thread has a press or a pipeline call of its own on the model.

    Args:
        model: the model whose forward is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._opened: list[_Opened] = []
        super().__init__(model, "forward", self._dispatch)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CapturedForward":
        """The one on the model, or a new one. The caller holds the model's lock."""
        forward = vars(model).get("forward")
        return forward if isinstance(forward, CapturedForward) else cls(model)

    def open(self, steps: Callable[..., Any], shared: bool) -> _Opened:
        """Send forwards to steps, until `close` is called with what this returns."""
        opened = _Opened(steps, threading.current_thread(), shared)
        self._opened = [*self._opened, opened]
        return opened

    def close(self, opened: _Opened) -> None:
        """Send no more forwards there; the last to close puts the model's own forward back."""
        self._opened = [other for other in self._opened if other is not opened]
        if not self._opened and vars(self.owner).get(self.name) is self:
            self.undo()

    def _dispatch(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        opened, this = self._opened, threading.current_thread()
        chosen = [other for other in opened if other.thread is this]
        if not chosen and not model_lock(self.owner).held:
            chosen = [other for other in opened if other.shared]
        return (chosen[-1].steps if chosen else forward)(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _itself, (self.original,)  # a copy of the model has contexts of its own


def _itself(forward: Any) -> Any:
    return forward
