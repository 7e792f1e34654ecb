"""What `enable` puts on a model: replacements of the methods that `generate` goes through."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from quantpress.cache import host
from quantpress.cache.text_cache import TextCache
from quantpress.cache.tokens.evicted_slots import MASKS
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.pipelines.attention_masks import fitted_masks, hiding_with_cache
from quantpress.pipelines.capture.eligibility import JoinKernels
from quantpress.pipelines.enabling.generate_call import (
    CURRENT_CALL,
    GenerateCall,
    check_call,
    refuse_continuous_batching,
    token_count,
    with_shifted_positions,
    without_positions,
)
from quantpress.pipelines.method_replacement import MethodReplacement
from quantpress.pipelines.press_argument import ENABLED
from quantpress.pipelines.ranks import check_clocks, share_chance
from quantpress.presses import Compose
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.models.filling import check_keeps
from quantpress.presses.models.lock import ModelLock, model_lock
from quantpress.presses.traits import decode_time_presses, renumbers_positions, traits_of


class Enabled:
    """What `enable` has put on a model; a context that removes it at its end.

    Args:
        model: the model to work on.
        press: the press to read prompts under.
        cuda_graph: see `enable`.
        join_kernels: see `enable`.

    Attributes:
        model, press, cuda_graph, join_kernels: the same.
        warned: whether the one warning that there is no graph was given.
        calls: the calls of `generate` that are running.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        press: Compose,
        cuda_graph: bool | None = None,
        join_kernels: JoinKernels = True,
    ) -> None:
        self.model, self.press = model, press
        self.cuda_graph, self.join_kernels = cuda_graph, join_kernels
        self.warned = self._ending = False
        self.calls: list[GenerateCall] = []
        self._decodes = bool(decode_time_presses(press))
        self._reads_again = any(traits_of(member).at_exit for member in press)
        self._attention = attention_modules(model)
        vars(model)[ENABLED] = self
        self._replaced = [
            MethodReplacement(model, "forward", self._forward),
            MethodReplacement(model, "generate", self._generate),
            MethodReplacement(model, "_prepare_cache_for_generation", self._prepare_cache),
            MethodReplacement(model, "prepare_inputs_for_generation", self._prepare_inputs),
            MethodReplacement(model, "init_continuous_batching", refuse_continuous_batching),
        ]

    @property
    def lock(self) -> ModelLock:
        """Held during each forward."""
        return model_lock(self.model)

    def __enter__(self) -> "Enabled":
        if not self._on_the_model():
            raise InvalidInputError(
                f"{self!r} was disabled before, and compresses nothing; call enable(model, ...) again"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._on_the_model():
            self.disable()

    def __repr__(self) -> str:
        return f"Enabled({type(self.model).__name__}, {self.press!r})"

    def _on_the_model(self) -> bool:
        return vars(self.model).get(ENABLED) is self

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
            if not self._on_the_model():
                return  # another thread was faster
            for replaced in self._replaced:
                replaced.undo()
            del vars(self.model)[ENABLED]

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
            call.assisted = mode == GenerationMode.ASSISTED_GENERATION
            check_clocks(self.model, config)
            share_chance(self.model, config)
        given = inputs.get(host.generate_cache())
        if config.use_cache is not False and (given is None or isinstance(given, TextCache)):
            check_keeps(self.model)
        result = prepare(config, inputs, mode, *rest)
        if given is not None or config.use_cache is False or (call is None and self._ending):
            return result
        made = inputs.get(host.generate_cache())
        if type(made) is not DynamicCache:
            raise InvalidInputError(
                f"generate makes a {type(made).__name__} here (cache_implementation="
                f"{config.cache_implementation!r}), which cannot be compressed; give "
                'cache_implementation="dynamic", or call disable(model)'
            )
        check_call(config, mode, self.press)
        inputs[host.generate_cache()] = cache = TextCache.of(made)
        if call is not None:
            call.cache = cache
        return result

    def _prepare_inputs(self, prepare: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.prepare_inputs_for_generation`."""
        call = self._current_call()
        if call is not None and call.assisted:
            return host.feed_new_tokens(prepare, *args, **kwargs)
        return prepare(*args, **kwargs)

    def _current_call(self) -> GenerateCall | None:
        """The call of this model's `generate` that is running in this thread."""
        call = CURRENT_CALL.get()
        return call if call is not None and call.owner is self else None

    def _forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """`model.forward`, one at a time: the hooks of a press would see every other one too."""
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with self.lock:
            cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, TextCache)), None)
            return forward(*args, **kwargs) if cache is None else self._read(forward, cache, args, kwargs)

    def _read(self, forward: Any, cache: TextCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward over a cache that `generate` has made."""
        seen, new = cache.get_seq_length(), token_count(args, kwargs)
        if seen == 0 and self._reads_again:
            kwargs = without_positions(kwargs)
        if cache.position_shift:
            kwargs = with_shifted_positions(kwargs, cache, seen, new, self.model.device)
        with fitted_masks(self.model, cache, new):
            if seen and not (self._decodes or cache.masked):
                call = self._current_call()
                step = forward if call is None or call.steps is None else call.steps
                with hiding_with_cache(self.model, cache) if self._hides_slots() else nullcontext():
                    return step(*args, **kwargs)
            with hiding_with_cache(self.model, cache), self._pressing(seen):
                output = forward(*args, **kwargs)
            cache.has_read(seen + new)
        if seen == 0 and renumbers_positions(self.press):
            cache.position_shift = max(cache.evicted.values(), default=0)
        return output

    def _hides_slots(self) -> bool:
        """Whether a head-wise press has left slots of another cache to hide."""
        return any(vars(module).get(MASKS) is not None for module in self._attention)

    @contextmanager
    def _pressing(self, seen: int) -> Iterator[None]:
        """The press's context: around a prefill or, if it acts during decoding, until `generate` ends."""
        call = self._current_call()
        if self._decodes and call is not None:
            if not call.entered:
                call.entered = True
                call.presses.enter_context(self.press(self.model))
            yield
        else:
            with self.press(self.model) if seen == 0 else nullcontext():
                yield
