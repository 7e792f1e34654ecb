"""One call on a model, and every `generate` after it uses a compressed cache."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from kvpress import BasePress
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from quantpress.cache.text_cache import TextCache
from quantpress.cache.tokens.evicted_slots import MASKS
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.pipelines.capture.captured import check_choice
from quantpress.pipelines.decoding import refuse_capture, rules_out_press
from quantpress.pipelines.enabling.generate_call import (
    CURRENT_CALL,
    GenerateCall,
    check_call,
    check_model,
    refuse_continuous_batching,
    token_count,
    with_positions,
    without_places,
)
from quantpress.pipelines.masks import fitted_masks
from quantpress.pipelines.preserve import masks_of_cache
from quantpress.pipelines.press_argument import PressOrBits, chosen_press
from quantpress.pipelines.replaced import Replaced
from quantpress.presses import Compose
from quantpress.presses.models.filling import check_keeps
from quantpress.presses.models.lock import ModelLock, model_lock
from quantpress.presses.models.support import attention_modules
from quantpress.presses.traits import decode_time_presses, renumbers_positions, traits_of

_STATE = "_quantpress_enabled"


def enable(
    model: PreTrainedModel, press: PressOrBits = None, *, cuda_graph: bool | None = None, **options: Any
) -> "Enabled":
    """Compress the cache of every later `model.generate`, with no other change.

    Whatever calls `generate` gets it: transformers' pipelines, `transformers serve`, code of others. The
    prompt is read under the press; its context is closed before the first new token, or at the end of the
    call for presses that act during decoding. A cache that `generate` has made may be given back to it with
    the whole conversation, as transformers' users do: it goes on where it was. Caches of the caller's own,
    calls with use_cache=False and forwards outside `generate` are left alone (use_cache=False in the model's
    own configuration does not count). `TextGenerationPipeline` takes the press of an enabled model where it
    is given none.

    On CUDA the decode steps of greedy and sampled calls replay graphs, as in `captured_decoding`; each call
    makes its own, and they go with it. `captured_decoding(model)` around the calls takes their place.

    Greedy, sampled, beam, assisted and prompt-lookup decoding work. Guesses that are rejected are dropped
    again; with codes they may move the moment at which a page of tokens is packed, so that assisted decoding
    gives the same tokens as greedy decoding only with a lossless codec.

    Threads may call `generate` at the same time: they take turns, forward by forward.

    Args:
        model: decoder-only, with `generate`.
        press: a press, a press class, a list of them (`Compose`), text (`parse_press`), code bits, or the
            name of a preset; None for `TurboQuant()`.
        cuda_graph: None: decode by replaying graphs on CUDA where it can be done; what a call or a press
            rules out by its nature (beams, guesses, acting during decoding) decodes as always, anything else
            after one warning. True: both are errors. False: never.
        **options: fields of `TurboQuant`, with bits, a preset or None.

    Returns:
        What was done: `disable(model)` undoes it, and so does leaving it as a context.

    Raises:
        InvalidInputError: the model is enabled already, or the arguments cannot be used; the model or the
            press rules out cuda_graph=True.
        CompositionError: presses that do not go together.
        UnsupportedModelError: the model's cache cannot be packed, or `generate` does not make it.

    Raises (in `generate`):
        InvalidInputError: a setting that rules it out: a static or quantized cache, prefill_chunk_size,
            continuous batching; assisted decoding from a prompt that an evictor thins out; what rules out
            cuda_graph=True.

    Example:
        >>> # enable(model, 4)
        >>> # model.generate(**inputs, max_new_tokens=100)
        >>> # disable(model)
        >>> # with enable(model, Compose([SnapKV, TurboQuant(bits=3)])):
        >>> #     model.generate(**inputs, max_new_tokens=100)
    """
    check_model(model)
    check_choice(cuda_graph)
    chosen = chosen_press(press, options)
    refuse_capture(rules_out_press(model, chosen), cuda_graph)
    with model_lock(model):
        if _STATE in vars(model):
            raise InvalidInputError(
                f"{type(model).__name__} is enabled already, with {vars(model)[_STATE].press!r}; "
                "call disable(model) first"
            )
        if not any(traits_of(member).at_exit for member in chosen):
            with chosen(model):  # what cannot work with this model says so now
                pass
        return Enabled(model, chosen, cuda_graph)


def disable(model: PreTrainedModel) -> None:
    """Undo `enable`: the model is as it was. Does nothing where it is not enabled.

    Calls of `generate` that run in other threads come to their end before.

    Raises:
        InvalidInputError: a method of the model was replaced since by something else.
    """
    state = vars(model).get(_STATE)
    if state is not None:
        state.disable()


def enabled_press(model: PreTrainedModel) -> BasePress | None:
    """The press of an enabled model; None of any other."""
    state = vars(model).get(_STATE)
    return None if state is None else state.press


class Enabled:
    """What `enable` has put on a model; a context that undoes it when it is left.

    Args:
        model: to work on.
        press: to read prompts under.
        cuda_graph: see `enable`.

    Attributes:
        model, press, cuda_graph: the same.
        warned: whether it was said why there is no graph.
        calls: of `generate` that are running.
    """

    def __init__(self, model: PreTrainedModel, press: Compose, cuda_graph: bool | None = None) -> None:
        self.model, self.press, self.cuda_graph = model, press, cuda_graph
        self.warned = self._ending = False
        self.calls: list[GenerateCall] = []
        self._decodes = bool(decode_time_presses(press))
        self._reads_again = any(traits_of(member).at_exit for member in press)
        self._attention = attention_modules(model)
        vars(model)[_STATE] = self
        self._replaced = [
            Replaced(model, "forward", self._forward),
            Replaced(model, "generate", self._generate),
            Replaced(model, "_prepare_cache_for_generation", self._prepare_cache),
            Replaced(model, "init_continuous_batching", refuse_continuous_batching),
        ]

    @property
    def lock(self) -> ModelLock:
        """Held during each forward."""
        return model_lock(self.model)

    def __enter__(self) -> "Enabled":
        return self

    def __exit__(self, *exception: object) -> None:
        if vars(self.model).get(_STATE) is self:
            self.disable()

    def __repr__(self) -> str:
        return f"Enabled({type(self.model).__name__}, {self.press!r})"

    def disable(self) -> None:
        """See `quantpress.disable`."""
        with self.lock:
            for replaced in self._replaced:
                replaced.check()
            self._ending = True
            running = [call for call in self.calls if call.thread is not threading.current_thread()]
        for call in running:
            call.ended.wait()
        with self.lock:
            if vars(self.model).get(_STATE) is not self:
                return  # another thread was quicker
            for replaced in self._replaced:
                replaced.undo()
            del vars(self.model)[_STATE]

    def _generate(self, generate: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`."""
        if self._ending:
            return generate(*args, **kwargs)
        with self.lock if self._decodes else nullcontext(), ExitStack() as presses:
            call = GenerateCall(self, presses)
            if self.model.generation_config.use_cache is False:  # left there by a training
                kwargs.setdefault("use_cache", True)
            token = CURRENT_CALL.set(call)
            try:
                output = generate(*args, **kwargs)
            finally:
                CURRENT_CALL.reset(token)
                call.close()
            if call.cache is not None and call.cache.get_seq_length() == 0:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} keeps keys and values in a cache of its own and left the "
                    "one that generate made empty: nothing was compressed; disable(model)"
                )
            return output

    def _prepare_cache(
        self, prepare: Any, config: GenerationConfig, inputs: dict[str, Any], mode: GenerationMode, *rest: Any
    ) -> Any:
        """`model._prepare_cache_for_generation`, which puts a cache into `inputs`."""
        call = self._current_call()
        if call is not None:
            call.choose_steps(config, mode, self._replaced[0].original)
        given = inputs.get("past_key_values")
        if config.use_cache is not False and (given is None or isinstance(given, TextCache)):
            check_keeps(self.model)
        result = prepare(config, inputs, mode, *rest)
        if given is not None or config.use_cache is False or (call is None and self._ending):
            return result
        made = inputs.get("past_key_values")
        if type(made) is not DynamicCache:
            raise InvalidInputError(
                f"generate makes a {type(made).__name__} here (cache_implementation="
                f"{config.cache_implementation!r}), which cannot be compressed; give "
                'cache_implementation="dynamic", or call disable(model)'
            )
        check_call(config, mode, self.press)
        inputs["past_key_values"] = cache = TextCache.of(made)
        if call is not None:
            call.cache = cache
        return result

    def _current_call(self) -> GenerateCall | None:
        """The call of this model's `generate` that is running in this thread."""
        call = CURRENT_CALL.get()
        return call if call is not None and call.owner is self else None

    def _forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.forward`: one at a time, since hooks of a press would see every other one too."""
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with self.lock:
            cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, TextCache)), None)
            return forward(*args, **kwargs) if cache is None else self._read(forward, cache, args, kwargs)

    def _read(self, forward: Any, cache: TextCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward over a cache that `generate` has made."""
        seen, new = cache.get_seq_length(), token_count(args, kwargs)
        if seen == 0 and self._reads_again:
            kwargs = without_places(kwargs)
        if cache.position_shift:
            kwargs = with_positions(kwargs, cache, seen, new, self.model.device)
        with fitted_masks(self.model, cache, new):
            if seen and not (self._decodes or cache.masked):
                call = self._current_call()
                step = forward if call is None or call.steps is None else call.steps
                with masks_of_cache(self.model, cache) if self._is_masked() else nullcontext():
                    return step(*args, **kwargs)
            with masks_of_cache(self.model, cache), self._pressing(seen):
                output = forward(*args, **kwargs)
            cache.has_read(seen + new)
        if seen == 0 and renumbers_positions(self.press):
            cache.position_shift = max(cache.evicted.values(), default=0)
        return output

    def _is_masked(self) -> bool:
        """Whether a head-wise press has left masks of another cache on the model."""
        return any(vars(module).get(MASKS) is not None for module in self._attention)

    @contextmanager
    def _pressing(self, seen: int) -> Iterator[None]:
        """The press's context around a prefill, or, opened by the first forward, until `generate` ends."""
        call = self._current_call()
        if self._decodes and call is not None:
            if not call.entered:
                call.entered = True
                call.presses.enter_context(self.press(self.model))
            yield
        else:
            with self.press(self.model) if seen == 0 else nullcontext():
                yield
