"""Leaves a model as a press found it, whatever happens inside the press's context.

kvpress gives every attention module a `rotary_emb`. Some presses replace `forward`, or switch the attention
implementation for a while. An exception in the middle of a prefill leaves a half-filled cache behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from quantpress.cache import host
from quantpress.cache.attention.functions import original_functions, put_back_functions
from quantpress.presses.models.attention import attention_modules, decoder_of
from quantpress.presses.models.lock import model_lock

_KEPT = "masked_key_indices"  # head-wise presses leave it on purpose, for attention after the prefill
_IMPLEMENTATION = "_attn_implementation_internal"  # behind transformers' property of the config
_MISSING = object()


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Undo what presses left behind on the model when the block ends.

    Always: attributes that were added to attention modules are removed and `forward` is put back where it was
    replaced (presses remove their hooks themselves). After an exception also: kvpress's
    `masked_key_indices`, the attention implementation and what presses did to transformers' attention
    functions are undone, and a cache whose prefill did not come to its end is empty again. Other threads
    wait until then with what they would put on the model (`model_lock`).
    """
    with model_lock(model), _restored(model):
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    modules = attention_modules(model)
    undo_forward = [_undo_attribute(part, "forward") for part in _parts(model)]
    before = [_Attributes(module) for module in modules]
    on_failure = [_undo_attribute(module, _KEPT) for module in modules]
    on_failure += [_undo_attribute(config, _IMPLEMENTATION) for config in _configs(model, modules)]
    functions = original_functions()
    guard = _PrefillGuard(decoder_of(model))
    try:
        yield
    except BaseException:
        for undo in on_failure:
            undo()
        put_back_functions(functions)
        guard.roll_back()
        raise
    finally:
        guard.remove()
        for attributes in before:
            attributes.remove_added()
        for undo in undo_forward:
            undo()


class _Attributes:
    """The names that an attention module had: plain attributes, submodules, buffers and parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.names = self._all()

    def _all(self) -> set[str]:
        return {*vars(self.module), *self.module._modules, *self.module._buffers, *self.module._parameters}

    def remove_added(self) -> None:
        for name in self._all() - self.names - {_KEPT}:
            delattr(self.module, name)


class _PrefillGuard:
    """Remembers the cache that a prefill fills, until the prefill is over."""

    def __init__(self, decoder: nn.Module) -> None:
        self._started: tuple[Cache, list[Any]] | None = None
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        if caches and hasattr(caches[0], "layers") and caches[0].get_seq_length() == 0:
            # Layers bind new tensors when they grow, so shallow copies stay empty, and states are copied.
            self._started = caches[0], [host.copied(layer) for layer in caches[0].layers]

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        self._started = None

    def roll_back(self) -> None:
        if self._started is not None:
            cache, layers = self._started
            cache.layers[:] = layers

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _parts(model: nn.Module) -> list[nn.Module]:
    """The model, what it calls `model`, and its decoder: where presses replace `forward`."""
    parts = [model, getattr(model, "model", model), decoder_of(model)]
    return list({id(part): part for part in parts if isinstance(part, nn.Module)}.values())


def _configs(model: nn.Module, modules: list[nn.Module]) -> list[Any]:
    configs = [getattr(part, "config", None) for part in (model, *modules)]
    return list({id(config): config for config in configs if config is not None}.values())


def _undo_attribute(owner: Any, name: str) -> Callable[[], None]:
    value = vars(owner).get(name, _MISSING)

    def undo() -> None:
        if value is not _MISSING:
            vars(owner)[name] = value
        else:
            vars(owner).pop(name, None)

    return undo
