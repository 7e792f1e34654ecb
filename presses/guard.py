"""A press's context as `Compose` enters it: hooks where they belong, and errors that say what is wrong.

kvpress skips sliding-window layers in one model only, takes padded batches without a word although its slots
no longer match the mask, and fails in many ways in the middle of a prefill of a model that it does not
support.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kvpress import SUPPORTED_MODELS, BasePress
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from quantpress.errors import CompositionError, QuantPressError, UnsupportedModelError
from quantpress.presses.base import name_of
from quantpress.presses.failures import UNEXPLAINED, named_failure
from quantpress.presses.models.support import attention_modules, hooked, is_sliding
from quantpress.presses.packing.prefill_hook import check_padding, is_padded, prefill_call
from quantpress.presses.traits import traits_of, with_inner

Hook = Callable[..., Any]


@contextmanager
def guarded(press: BasePress, model: PreTrainedModel) -> Iterator[None]:
    """Enter a press's context without its hooks on sliding-window layers.

    Raises (from inside, at a prefill):
        InvalidInputError: it cannot compress this context.
        CompositionError: it evicts from a padded batch, at once or while decoding, or evicts only when its
            context ends and is used around `generate`.
        UnsupportedModelError: the press failed, in a model that kvpress does not support or whose weights are
            offloaded.
    """
    modules = attention_modules(model)
    before = [set(module._forward_hooks) for module in modules]
    supported = isinstance(model, SUPPORTED_MODELS) and not _offloaded(modules)
    with press(model):
        for module, known in zip(modules, before, strict=True):
            for hook_id in set(module._forward_hooks) - known:
                if is_sliding(module):
                    del module._forward_hooks[hook_id]
                    module._forward_hooks_with_kwargs.pop(hook_id, None)
                else:
                    explain = named if supported else _explained
                    module._forward_hooks[hook_id] = explain(press, module._forward_hooks[hook_id])
        with hooked(model, _check(press)):
            yield


@contextmanager
def named_context(press: BasePress, model: PreTrainedModel) -> Iterator[None]:
    """A press's own context, where a press of kvpress names its failures at a prefill."""
    modules = attention_modules(model) if type(press).__module__.startswith("kvpress.") else []
    before = [set(module._forward_hooks) for module in modules]
    with press(model):
        for module, known in zip(modules, before, strict=True):
            for hook_id in set(module._forward_hooks) - known:
                module._forward_hooks[hook_id] = named(press, module._forward_hooks[hook_id])
        yield


def named(press: BasePress, hook: Hook) -> Hook:
    """The hook of a press, which raises `InvalidInputError` where it cannot compress a context."""

    @functools.wraps(hook)
    def run(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = prefill_call(module, args, kwargs)
        if call is None:
            return hook(module, args, kwargs, output)
        with named_failure(press, call.tokens):
            return hook(module, args, kwargs, output)

    return run


def _check(press: BasePress) -> Hook:
    at_exit = traits_of(press).at_exit
    moves_slots = any(traits_of(inner).moves_slots for inner in with_inner(press))

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = prefill_call(module, args, kwargs)
        if call is None:
            return
        kept = call.cache.get_seq_length(call.layer_idx)
        if at_exit and kept > call.tokens:
            raise CompositionError(
                f"{name_of(press)} reads the context again and evicts when its `with` block ends: inside, "
                "only read, model.model(input_ids=ids, past_key_values=DynamicCache()); generate afterwards"
            )
        if is_padded(call.attention_mask) and moves_slots:
            raise CompositionError(
                f"{name_of(press)} evicts while decoding, and slots of a padded batch would no longer match "
                "the attention mask; give contexts one at a time, or of equal length"
            )
        check_padding(call, 0 if at_exit else kept)

    return check


def _explained(press: BasePress, hook: Hook) -> Hook:
    def explained(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = prefill_call(module, args, kwargs)
        before = None if call is None else _head_dims(call.cache.layers[call.layer_idx])
        try:
            result = hook(module, args, kwargs, output)
        except (QuantPressError, torch.OutOfMemoryError):
            raise
        except UNEXPLAINED as error:
            raise _unsupported(press, module, str(error)) from error
        if call is not None and _head_dims(call.cache.layers[call.layer_idx]) != before:
            raise _unsupported(press, module, "it cut the channels of keys or values")
        return result

    # Under its own name, a hook that acts while decoding is known to be one (`captured_decoding`).
    return functools.wraps(hook)(explained) if traits_of(press).decodes else explained


def _head_dims(layer: Any) -> tuple[int, ...]:
    return tuple(states.shape[-1] for states in (layer.keys, layer.values) if states is not None)


def _offloaded(modules: list[nn.Module]) -> bool:
    """Whether `device_map` keeps weights elsewhere until a module is called."""
    return any(parameter.is_meta for module in modules for parameter in module.parameters())


def _unsupported(press: BasePress, module: nn.Module, reason: str) -> UnsupportedModelError:
    if _offloaded([module]):
        advice = "The device_map keeps its weights elsewhere until they are called; leave room for them, or "
    else:
        models = ", ".join(sorted(model.__name__ for model in SUPPORTED_MODELS))
        advice = f"kvpress supports {models}; with other models "
    return UnsupportedModelError(
        f"{name_of(press)} does not work with {type(module).__name__}: {reason}. {advice}"
        "use another press, or TurboQuant alone"
    )
