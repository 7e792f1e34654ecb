"""A press's context as `Compose` enters it: hooks where they belong, and errors that say what is wrong.

kvpress skips sliding-window layers in one model only. It accepts padded batches, although slots no longer
match the mask after an eviction. In a model that it does not support it fails in many ways in the middle of
a prefill.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantpress.cache import host
from quantpress.errors import CompositionError, InvalidInputError, QuantPressError, UnsupportedModelError
from quantpress.presses.base_press import BasePress
from quantpress.presses.models.attention import attention_modules, decoder_of, hooked, is_sliding
from quantpress.presses.models.full_layers import as_kvpress_sees
from quantpress.presses.models.old_names import old_names
from quantpress.presses.packing.like_llama import check_like_llama, leaves_channels_out
from quantpress.presses.packing.prefill_hook import check_padding, is_padded, prefill_call
from quantpress.presses.ranks import own_heads
from quantpress.presses.traits import name_of, short_repr, traits_of, with_inner

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

Hook = Callable[..., Any]

SHORT_TOKENS = 64
"""Below this length kvpress's presses fail in many ways, because windows, sinks and chunks do not fit."""

UNEXPLAINED = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""The exceptions that kvpress's presses raise in a prefill that they were not made for."""

_ASKS_FOR = (
    ('attn_implementation="eager"', "eager"),  # ObservedAttention
    ("eager mode not supported", "sdpa"),  # AdaKV and others that hide tokens by head
    ("does not support attentions", "sdpa"),  # Block, Chunk
)
"""What kvpress's assertions say where a press needs attention of another kind, and which."""


@contextmanager
def guarded(press: BasePress, model: "PreTrainedModel") -> Iterator[None]:
    """Enter a press's context without its hooks on sliding-window layers.

    Raises (from inside, at a prefill):
        InvalidInputError: the press cannot compress this context.
        CompositionError: the press evicts from a padded batch, at the prefill or while decoding; or it evicts
            only when its context ends, and the context is entered around `generate`.
        UnsupportedModelError: the press failed in a model that kvpress does not support, or whose weights are
            offloaded.
    """
    modules = attention_modules(model)
    before = [set(module._forward_hooks) for module in modules]
    supported = isinstance(model, _supported_models() or object) and not _offloaded(modules)
    with old_names(decoder_of(model), modules), own_heads(press, model), _own_context(press, model):
        for module, known in zip(modules, before, strict=True):
            for hook_id in set(module._forward_hooks) - known:
                if is_sliding(module):
                    del module._forward_hooks[hook_id]
                    module._forward_hooks_with_kwargs.pop(hook_id, None)
                else:
                    explain = named if supported else _explained
                    module._forward_hooks[hook_id] = explain(press, module._forward_hooks[hook_id])
        reading = _only_reading(press, model) if traits_of(press).at_exit else nullcontext()
        with hooked(model, _check(press)), reading:
            yield


@contextmanager
def named_context(press: BasePress, model: "PreTrainedModel") -> Iterator[None]:
    """Enter a press's own context, with errors of kvpress's presses at a prefill explained."""
    modules = attention_modules(model) if type(press).__module__.startswith("kvpress.") else []
    checked = like_llama(press, model) if modules else nullcontext()
    names = old_names(decoder_of(model), attention_modules(model))
    with names, own_heads(press, model), checked, ExitStack() as stack:
        before = [set(module._forward_hooks) for module in modules]
        stack.enter_context(press(_seen_by(press, model)))
        for module, known in zip(modules, before, strict=True):
            for hook_id in set(module._forward_hooks) - known:
                module._forward_hooks[hook_id] = named(press, module._forward_hooks[hook_id])
        yield


def _own_context(press: Any, model: "PreTrainedModel") -> AbstractContextManager[Any]:
    """That of a press among others; some refuse to be entered alone."""
    context: AbstractContextManager[Any] = (
        press.scoring(model) if traits_of(press).demotes else press(_seen_by(press, model))
    )
    return context


def _seen_by(press: BasePress, model: "PreTrainedModel") -> Any:
    """The model, or what stands for it; `PressMixin` does that itself."""
    return model if hasattr(press, "composition") else as_kvpress_sees(model, press)


@contextmanager
def like_llama(press: BasePress, model: "PreTrainedModel") -> Iterator[None]:
    """Refuse a model that rotates or norms in another way than kvpress takes all models to do.

    Enter it before any press's context that evicts. Only presses that compute queries or turn keys are
    checked, and only models that kvpress was not made for, or whose rotary embedding leaves channels out
    (Phi-4-mini); hybrid ones have rules of their own.

    Raises (from inside, at a prefill):
        UnsupportedModelError: keys that kvpress computes are not those in the cache.
    """
    traits = [one for one in map(traits_of, with_inner(press)) if one.like_llama or one.rerotates]
    if not traits or host.is_hybrid(model):
        yield
        return
    supported = isinstance(model, _supported_models())

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        call = prefill_call(module, args, kwargs)
        if supported and (call is None or not leaves_channels_out(call)):
            return
        computes = any(one.like_llama and (weights is None or not one.takes_weights) for one in traits)
        if call is not None and (computes or any(one.rerotates for one in traits)):
            reason = "kvpress does not compute its queries and keys as the model does"
            if all(one.takes_weights for one in traits):
                reason += ', and need not if the model is loaded with attn_implementation="eager"'
            check_like_llama(call, _unsupported(press, module, reason), turned_only=not computes)

    with hooked(model, check):
        yield


def named(press: BasePress, hook: Hook) -> Hook:
    """A press's hook that raises `InvalidInputError` when the press cannot compress a context."""

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
            raise _only_reads(press)
        if is_padded(call.attention_mask) and moves_slots:
            raise CompositionError(
                f"{name_of(press)} evicts while decoding, and slots of a padded batch would no longer match "
                "the attention mask; give contexts one at a time, or of equal length"
            )
        check_padding(call, 0 if at_exit else kept)

    return check


def _only_reads(press: BasePress) -> CompositionError:
    return CompositionError(
        f"{name_of(press)} reads the context again and evicts when its `with` block ends: inside, only read, "
        "model.model(input_ids=ids, past_key_values=DynamicCache()); generate afterwards"
    )


@contextmanager
def _only_reading(press: BasePress, model: nn.Module) -> Iterator[None]:
    """Refuse to go on from a cache inside the context of a press that evicts when its context ends."""

    def check(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = host.cache_in(args, kwargs)
        if cache is not None and cache.get_seq_length():
            raise _only_reads(press)

    handle = decoder_of(model).register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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

    # `captured_decoding` recognizes a hook that acts while decoding by its name.
    return functools.wraps(hook)(explained) if traits_of(press).decodes else explained


def _head_dims(layer: Any) -> tuple[int, ...]:
    return tuple(states.shape[-1] for states in (layer.keys, layer.values) if states is not None)


def _supported_models() -> tuple[type, ...]:
    """The models that kvpress's presses are made for; none while kvpress is not imported."""
    supported: tuple[type, ...] = getattr(sys.modules.get("kvpress"), "SUPPORTED_MODELS", ())
    return supported


def _offloaded(modules: list[nn.Module]) -> bool:
    """Whether `device_map` keeps weights elsewhere until a module is called."""
    return any(parameter.is_meta for module in modules for parameter in module.parameters())


def _unsupported(press: BasePress, module: nn.Module, reason: str) -> UnsupportedModelError:
    if _offloaded([module]):
        advice = "The device_map keeps its weights elsewhere until they are called; free memory for them, or "
    else:
        models = ", ".join(sorted(model.__name__ for model in _supported_models()))
        advice = f"kvpress supports {models}; with other models " if models else "With this model "
    return UnsupportedModelError(
        f"{name_of(press)} does not work with {type(module).__name__}: {reason}. {advice}"
        "use another press, or TurboQuant alone"
    )


@contextmanager
def named_failure(press: BasePress, tokens: int) -> Iterator[None]:
    """Name the press and the remedy when a press fails at a prefill.

    kvpress asserts what a press needs: mostly a length of the context, or a kind of attention. In a short
    context, any other exception is taken to mean its length. Exceptions of presses from elsewhere are left as
    they are.

    Args:
        press: the press that runs inside.
        tokens: length of the context.

    Raises:
        InvalidInputError: raised instead of the press's exception.
    """
    try:
        with named_assertion(press, tokens):
            yield
    except (QuantPressError, torch.OutOfMemoryError):
        raise
    except UNEXPLAINED as error:
        if tokens >= SHORT_TOKENS or not _of_kvpress(press):
            raise
        raise _cannot_compress(press, tokens, f"{type(error).__name__}: {error}") from error


@contextmanager
def named_assertion(press: BasePress | None, tokens: int) -> Iterator[None]:
    """The part of `named_failure` that can enclose a whole prefill, since only presses use asserts there."""
    try:
        yield
    except AssertionError as error:
        if press is None:
            raise
        raise _cannot_compress(press, tokens, str(error)) from error


def _of_kvpress(press: BasePress) -> bool:
    return type(press).__module__.split(".")[0] in ("kvpress", "quantpress")


def _cannot_compress(press: BasePress, tokens: int, reason: str) -> InvalidInputError:
    what = next((implementation for words, implementation in _ASKS_FOR if words in reason), None)
    remedy = "Give a longer context, a press with smaller windows, or press=None"
    if what is not None:
        remedy = f'Load the model with attn_implementation="{what}", or give another press'
    cannot = "cannot compress" if what is not None else f"cannot compress this context of {tokens} tokens"
    return InvalidInputError(f"{short_repr(press)} {cannot}: {reason.rstrip('.')}. {remedy}")
