"""One call of `generate` on an enabled model: what it may ask for, and what of it must be kept apart."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from quantpress.cache.text_cache import TextCache
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.pipelines.capture.captured import CapturedDecoding
from quantpress.pipelines.decoding import refuse_capture, rules_out_press
from quantpress.presses import Compose
from quantpress.presses.traits import decode_time_presses


class GenerateCall:
    """One call of `generate`.

    Args:
        owner: the `Enabled` whose model it is.
        presses: closed when the call ends.

    Attributes:
        entered: whether the press's context is open until then.
        cache: the one that this call has made.
        steps: its single-token forwards; None: they run as always.
        samples: whether it draws random numbers between forwards.
        thread: that made the call.
        ended: set when the call has ended.
    """

    def __init__(self, owner: Any, presses: ExitStack) -> None:
        self.owner, self.presses = owner, presses
        self.entered = False
        self.cache: TextCache | None = None
        self.steps: CapturedDecoding | None = None
        self.samples = False
        self.thread, self.ended = threading.current_thread(), threading.Event()
        with owner.lock:
            owner.calls.append(self)

    def choose_steps(
        self, config: GenerationConfig, mode: GenerationMode, forward: Callable[..., Any]
    ) -> None:
        """Decode by replaying graphs, where this call can.

        Args:
            config: of the call.
            mode: how it decodes.
            forward: the model's own.

        Raises:
            InvalidInputError: it cannot, and the owner's cuda_graph is True.
        """
        owner, self.samples = self.owner, bool(config.do_sample)
        if owner.cuda_graph is False or rules_out_press(owner.model, owner.press) is not None:
            return
        if mode not in TOKEN_BY_TOKEN:
            refuse_capture(f"{mode.value} does not decode one token after the other", owner.cuda_graph)
            return
        self.steps = CapturedDecoding(owner.model, forward, None, owner.cuda_graph)
        self.steps.warned, self.steps.may_capture = owner.warned, self.may_capture

    def may_capture(self) -> bool:
        """Whether no other call can draw random numbers meanwhile, which CUDA's generator would refuse.

        A call that starts now waits for the model, which a forward of this one holds.
        """
        return not any(call.samples for call in self.owner.calls if call is not self)

    def close(self) -> None:
        """Let the graphs go, and the cache grow again."""
        with self.owner.lock:
            self.owner.calls.remove(self)
            steps, self.steps = self.steps, None
            if steps is not None:
                self.owner.warned |= steps.warned
                steps.close()
        self.ended.set()


TOKEN_BY_TOKEN = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Ways of decoding whose every step is one token on top of the one before."""

CURRENT_CALL: ContextVar[GenerateCall | None] = ContextVar("generate call", default=None)


def check_model(model: Any) -> None:
    """Refuse what is no generating model, or one whose cache `generate` does not make.

    Raises:
        UnsupportedModelError: saying which.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers model that generates; give a ...ForCausalLM, of an "
            "adapter the model inside (`get_base_model()`)"
        )
    dynamic: Any = model._supports_default_dynamic_cache
    if not dynamic():
        raise UnsupportedModelError(
            f"{type(model).__name__} makes a cache of its own kind, which cannot be compressed"
        )


def check_call(config: GenerationConfig, mode: GenerationMode, press: Compose) -> None:
    """Refuse settings of `generate` that a press cannot work under.

    Raises:
        InvalidInputError: prefill in chunks; guesses beside a prompt that is evicted from; several sequences
            under a press that acts during decoding.
    """
    if config.prefill_chunk_size is not None:
        raise InvalidInputError(
            f"prefill_chunk_size={config.prefill_chunk_size} would show the press the first piece of the "
            "prompt only; leave it out: `with chunked_prefill(model):` around generate keeps activations "
            "as small"
        )
    assisted = mode == GenerationMode.ASSISTED_GENERATION
    if assisted and press.evictors:
        raise InvalidInputError(
            "assisted decoding reads its first guesses together with the prompt, and "
            f"{press!r} might evict them; leave it out, or use TextGenerationPipeline, which reads "
            "the prompt before"
        )
    if decode_time_presses(press) and (assisted or (config.num_beams or 1) > 1):
        raise InvalidInputError(
            f"{press!r} acts during decoding, on one sequence, one token at a time; leave out "
            "num_beams and assisted decoding"
        )


def refuse_continuous_batching(method: Any, *args: Any, **kwargs: Any) -> Any:
    """In the place of `model.init_continuous_batching`.

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


def without_places(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the model finds out by itself, for presses that read the same ids once more behind the first."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        return kwargs  # a padded batch, which such presses refuse
    places = ("attention_mask", "cache_position", "position_ids")
    return {name: value for name, value in kwargs.items() if name not in places}


def with_positions(
    kwargs: dict[str, Any], cache: TextCache, seen: int, new: int, device: torch.device
) -> dict[str, Any]:
    """Positions after a press that numbered the kept tokens anew."""
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(seen, seen + new, device=device).unsqueeze(0)
    return kwargs | {"position_ids": positions - cache.position_shift}
