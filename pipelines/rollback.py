"""Leaving no trace: a context is rolled back after a question, a model after a press."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from quantpress.cache import host
from quantpress.cache.fixed.plain import BufferedLayer, become
from quantpress.cache.tokens.evicted_slots import MASKS
from quantpress.pipelines.attention_masks import remember_hidden_slots
from quantpress.presses.base_press import BasePress
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.models.lock import model_lock
from quantpress.presses.models.restore import left_as_found
from quantpress.presses.traits import members, traits_of


@contextmanager
def context_rollback(cache: Cache, model: PreTrainedModel, press: BasePress | None = None) -> Iterator[None]:
    """Undo on exit everything that a question, its answer or an exception did to the context.

    Tensors are not copied: layers grow by making new ones, so references to the old ones are enough. Only
    layers that write in place (static caches) are cloned.

    Args:
        cache: holds the context, in any kind of layers.
        model: the model; its attention modules name the slots that head-wise presses hide.
        press: the press of the question. DMSPress keeps notes while it decodes, which are rolled back too.
    """
    layers = list(cache.layers)
    undo = [_remember(layer) for layer in layers]
    undo.append(remember_hidden_slots(model))
    undo += [_remember_notes(member) for member in members(press) if traits_of(member).keeps_scores]
    try:
        yield
    finally:
        cache.layers[:] = layers
        for restore in undo:
            restore()


@contextmanager
def model_rollback(model: PreTrainedModel, keep_masks: bool = False) -> Iterator[None]:
    """Remove on exit, also after an exception, everything that presses leave on a model.

    `left_as_found` keeps the slots that head-wise presses hide; here they are removed too. Other threads wait
    for the model meanwhile.

    Args:
        model: the model that presses will be applied to.
        keep_masks: keep `masked_key_indices` unless there is an exception, for a caller who continues with
            the cache.
    """
    with model_lock(model):
        restore = remember_hidden_slots(model)
        with left_as_found(model):
            yield
        if not keep_masks:
            restore()
            for module in attention_modules(model):
                if getattr(module, MASKS, ()) is None:  # kvpress leaves it, and it hides nothing
                    delattr(module, MASKS)


def _remember(layer: Any) -> Callable[[], None]:
    """A function that brings a layer back to what it is now."""
    if hasattr(layer, "snapshot"):
        snapshot = layer.snapshot()
        return lambda: layer.restore(snapshot)
    if isinstance(layer, BufferedLayer):
        layer.release()
    kind, in_place = type(layer), layer.is_compileable or isinstance(layer, host.LINEAR_LAYER)
    state = {name: _held(value, in_place) for name, value in vars(layer).items()}
    return lambda: become(layer, kind, state)


def _held(value: Any, in_place: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone() if in_place else value
    if isinstance(value, dict):
        return {name: _held(one, in_place) for name, one in value.items()}
    return copy.copy(value) if isinstance(value, list) else value


def _remember_notes(press: Any) -> Callable[[], None]:
    scores = dict(press.scores_buffer)

    def restore() -> None:
        press.scores_buffer.clear()
        press.scores_buffer.update(scores)

    return restore
