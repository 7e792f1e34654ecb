"""Leaving no trace: a cache that does not notice a question, a model that does not notice a press."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kvpress import BasePress
from transformers import Cache, PreTrainedModel

from quantpress.cache.fixed.plain import BufferedLayer
from quantpress.cache.text_cache import TextCache
from quantpress.cache.tokens.evicted_slots import MASKS, named_to_hide
from quantpress.presses.models.lock import model_lock
from quantpress.presses.models.restore import left_as_found
from quantpress.presses.models.support import attention_modules
from quantpress.presses.traits import members, traits_of

_MISSING: Any = object()


@contextmanager
def preserved_context(cache: Cache, model: PreTrainedModel, press: BasePress | None = None) -> Iterator[None]:
    """Undo on exit everything that a question, its answer or an exception did to the context.

    Tensors are not copied: layers grow by making new ones, so the references are enough. Only layers that
    write in place (static caches) are cloned.

    Args:
        cache: holds the context; any kind of layers.
        model: whose attention modules hold the masks of head-wise presses.
        press: one that acts during decoding keeps notes that are taken back too.
    """
    layers = list(cache.layers)
    undo = [_remember(layer) for layer in layers]
    modules = [module for module in attention_modules(model) if hasattr(module, MASKS)]
    masks = [getattr(module, MASKS) for module in modules]
    noting: list[Any] = [member for member in members(press) if traits_of(member).keeps_scores]
    notes = [dict(member.scores_buffer) for member in noting]
    try:
        yield
    finally:
        cache.layers[:] = layers
        for restore in undo:
            restore()
        for module, mask in zip(modules, masks, strict=True):
            setattr(module, MASKS, mask)
        for member, scores in zip(noting, notes, strict=True):
            member.scores_buffer.clear()
            member.scores_buffer.update(scores)


@contextmanager
def unchanged_model(model: PreTrainedModel, keep_masks: bool = False) -> Iterator[None]:
    """Take away on exit, also after an exception, all that presses leave on a model.

    `left_as_found` leaves the masks of head-wise presses; here they go too. Other threads wait meanwhile.

    Args:
        model: the model that presses will be applied to.
        keep_masks: leave `masked_key_indices` after a success, for a caller who goes on with the cache.
    """
    with model_lock(model):
        modules = attention_modules(model)
        masks = [getattr(module, MASKS, None) for module in modules]
        with left_as_found(model):
            yield
        if not keep_masks:
            for module, mask in zip(modules, masks, strict=True):
                if mask is None:
                    vars(module).pop(MASKS, None)
                else:
                    setattr(module, MASKS, mask)


@contextmanager
def masks_of_cache(model: PreTrainedModel, cache: TextCache) -> Iterator[None]:
    """What head-wise presses mask goes with the cache: the model has it only while inside."""
    modules = attention_modules(model)
    before = [vars(module).get(MASKS, _MISSING) for module in modules]
    places: list[Any] = [module.layer_idx for module in modules]
    for place, module in zip(places, modules, strict=True):
        setattr(module, MASKS, cache.masked.get(place))
    try:
        yield
        hidden = {place: named_to_hide(m) for place, m in zip(places, modules, strict=True)}
        cache.masked = {place: named for place, named in hidden.items() if named is not None}
    finally:
        for module, mask in zip(modules, before, strict=True):
            if mask is _MISSING:
                vars(module).pop(MASKS, None)
            else:
                setattr(module, MASKS, mask)


def _remember(layer: Any) -> Callable[[], None]:
    if hasattr(layer, "snapshot"):
        snapshot = layer.snapshot()
        return lambda: layer.restore(snapshot)
    if isinstance(layer, BufferedLayer):
        layer.release()
    in_place, kind = layer.is_compileable, type(layer)
    state = {name: _held(value, in_place) for name, value in vars(layer).items()}

    def restore() -> None:
        vars(layer).clear()
        layer.__class__ = kind
        vars(layer).update(state)

    return restore


def _held(value: Any, in_place: bool) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone() if in_place else value
    return copy.copy(value) if isinstance(value, (list, dict)) else value
