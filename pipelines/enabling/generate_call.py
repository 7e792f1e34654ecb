"""One call of `generate` on an enabled model: its state, its settings, and arguments of its forwards."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from quantpress.cache.text_cache import TextCache
from quantpress.errors import InvalidInputError
from quantpress.pipelines.capture.captured_steps import CapturedDecoding
from quantpress.pipelines.capture.eligibility import refuse, why_not
from quantpress.pipelines.decoding import check_decode_time_press
from quantpress.presses import Compose


class GenerateCall:
    """One call of `generate`.

    Args:
        owner: the `Enabled` of the model.
        presses: closed when the call ends.

    Attributes:
        entered: whether `presses` holds the open context of the press.
        cache: the cache that this call has made.
        steps: runs single-token forwards; None: they run without a graph.
        samples: whether the call draws random numbers between forwards.
        thread: the thread that made the call.
        ended: set when the call has ended.
    """

    def __init__(self, owner: Any, presses: ExitStack) -> None:
        self.owner, self.presses = owner, presses
        self.entered = False
        self.cache: TextCache | None = None
        self.steps: CapturedDecoding | None = None
        self.samples = self.assisted = False
        self.thread, self.ended = threading.current_thread(), threading.Event()
        with owner.lock:
            owner.calls.append(self)

    def choose_steps(
        self, config: GenerationConfig, mode: GenerationMode, forward: Callable[..., Any]
    ) -> None:
        """Decode by replaying graphs if this call can.

        Args:
            config: the configuration of the call.
            mode: the way it decodes.
            forward: the model's own forward.

        Raises:
            InvalidInputError: the call cannot, and the owner's cuda_graph is True.
        """
        owner, self.samples = self.owner, bool(config.do_sample)
        reasons = why_not(device=owner.model.device, press=owner.press, mode=mode)
        refuse(reasons, owner.cuda_graph)
        if reasons or owner.cuda_graph is False:
            return
        self.steps = CapturedDecoding(
            owner.model, forward, None, owner.cuda_graph, join_kernels=owner.join_kernels
        )
        self.steps.warned, self.steps.may_capture = owner.warned, self.may_capture

    def may_capture(self) -> bool:
        """Whether no other call can draw random numbers meanwhile: CUDA's generator would refuse.

        A call that starts now waits for the model, which a forward of this call holds.
        """
        others = (call for call in self.owner.calls if call is not self)
        return not why_not(others_sample=any(call.samples for call in others))

    def close(self) -> None:
        """Free the graphs, and let the cache grow again."""
        with self.owner.lock:
            self.owner.calls.remove(self)
            steps, self.steps = self.steps, None
            if steps is not None:
                self.owner.warned |= steps.warned
                steps.close()
        self.ended.set()


CURRENT_CALL: ContextVar[GenerateCall | None] = ContextVar("generate call", default=None)


def check_call(config: GenerationConfig, mode: GenerationMode, press: Compose) -> None:
    """Refuse settings of `generate` under which a press cannot work.

    Raises:
        InvalidInputError: the prompt would be read in pieces; guesses would be read with a prompt that is
            evicted from; several sequences would be decoded under a press that acts during decoding.
    """
    if config.prefill_chunk_size is not None:
        raise InvalidInputError(
            f"prefill_chunk_size={config.prefill_chunk_size} would show the press the first piece of the "
            "prompt only; leave it out: `with chunked_prefill(model):` around generate keeps activations "
            "as small"
        )
    if mode == GenerationMode.ASSISTED_GENERATION and press.evictors:
        raise InvalidInputError(
            "assisted decoding reads its first guesses together with the prompt, and "
            f"{press!r} might evict them; leave it out, or use TextGenerationPipeline, which reads "
            "the prompt before"
        )
    check_decode_time_press(mode, press)


def refuse_continuous_batching(method: Any, *args: Any, **kwargs: Any) -> Any:
    """Takes the place of `model.init_continuous_batching`.

    Raises:
        InvalidInputError: always.
    """
    raise InvalidInputError(
        "continuous batching keeps keys and values in pages of its own, which cannot be compressed; "
        "disable(model), or generate without it"
    )


def token_count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens that a forward is given for each sequence."""
    for name in ("input_ids", "inputs_embeds"):
        if kwargs.get(name) is not None:
            return int(kwargs[name].shape[1])
    return int(args[0].shape[1])


def without_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what the model derives itself, for presses that read the ids once more after the first time."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        return kwargs  # a padded batch, which such presses refuse
    derived = ("attention_mask", "cache_position", "position_ids")
    return {name: value for name, value in kwargs.items() if name not in derived}


def with_shifted_positions(
    kwargs: dict[str, Any], cache: TextCache, seen: int, new: int, device: torch.device
) -> dict[str, Any]:
    """With the positions that follow those of a press which has numbered the kept tokens anew."""
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(seen, seen + new, device=device).unsqueeze(0)
    return kwargs | {"position_ids": positions - cache.position_shift}
