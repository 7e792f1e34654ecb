"""Lets every attention implementation of transformers read packed layers.

While a packed layer exists, the functions in `ALL_ATTENTION_FUNCTIONS` are wrapped: packed keys and values go
to `quantpress.kernels.attend`, everything else goes to the function that was there. Names, masks and models
stay as they are. An attention function that is not wrapped still gets right results, since `PackedStates`
decodes itself.
"""

import functools
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from quantpress.cache.attention import step
from quantpress.cache.attention.by_heads import attend
from quantpress.cache.attention.functions import (
    TORCH_ATTENTION,
    AttentionFunction,
    FunctionWrapper,
    model_eager_attention,
)
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.attention.visibility import padding, visibility, visibility_of_stored, whole_mask
from quantpress.cache.tokens.evicted_slots import MASKS, named_to_hide
from quantpress.cache.tokens.view import PackedView
from quantpress.kernels.attend import Segment

IGNORES_SOFTCAP = ("sdpa",)
"""Implementations that leave out a model's softcap (Gemma 2); packed layers then leave it out too."""

TAKES_MASKS = ("sdpa", "eager")
"""Implementations that take a mask [B, Hq, Tq, T]; the model's eager attention stands in for the others."""


def _reads_packed(function: AttentionFunction, name: str) -> AttentionFunction:
    if "paged" in name or name in ("flex_attention", TORCH_ATTENTION):
        return function
    return _dispatch(function, caps=name not in IGNORES_SOFTCAP, masks=name in TAKES_MASKS)


PACKED_ATTENTION = FunctionWrapper(_reads_packed)
"""Attention that reads packed layers. Its users are whatever hands packed states to a model: every
`PackedLayer`, every `TokenBuffer`, and `install_packed_attention`."""

_installed = ExitStack()


def install_packed_attention() -> None:
    """Let attention read packed layers until `uninstall_packed_attention`, whether there are any or not.

    Packed layers see to this themselves as long as they exist, so it is rarely needed. It does nothing when
    it was called before. Import kvpress first: it wraps the same functions when it is imported, and its
    wrappers have to lie inside.
    """
    before = _installed.pop_all()
    _installed.enter_context(PACKED_ATTENTION.in_place())
    before.close()


def uninstall_packed_attention() -> None:
    """Take back `install_packed_attention`; does nothing when it was not called.

    Every attention function is as it was once no packed layer exists any more. A layer in a reference cycle,
    as an exception's traceback may make one, exists until the garbage collector has run.
    """
    _installed.close()


def _dispatch(original: AttentionFunction, caps: bool, masks: bool) -> AttentionFunction:
    @functools.wraps(original)
    def packed_attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if step.is_compiled_step():
            return _traced(module, query, key, value, kwargs, caps), None
        if not isinstance(key, PackedStates) and not isinstance(value, PackedStates):
            return original(module, query, key, value, attention_mask, *args, **kwargs)
        view = _same_view(key, value)
        if view is not None and view.heads is not None and _needs_dense(module, query, kwargs):
            dense = original if masks else model_eager_attention
            return _attend_dense(dense, module, query, view, attention_mask, args, kwargs)
        if view is None or _needs_dense(module, query, kwargs):
            keys = key.dense() if isinstance(key, PackedStates) else key
            values = value.dense() if isinstance(value, PackedStates) else value
            return original(module, query, keys, values, attention_mask, *args, **kwargs)
        if not caps:
            kwargs.pop("softcap", None)
        return _attend_view(module, query, view, attention_mask, kwargs), None

    return packed_attention


def _same_view(key: torch.Tensor, value: torch.Tensor) -> PackedView | None:
    if isinstance(key, PackedStates) and isinstance(value, PackedStates) and key.packed and value.packed:
        same = key.packed is value.packed or key.packed.shape == value.packed.shape
        return key.packed if same else None
    return None


def _needs_dense(module: torch.nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Attention weights, dropout, biases and gradients: the original function, on decoded keys and values."""
    weights = kwargs.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    )
    dropout = kwargs.get("dropout", 0.0) and module.training
    biased = kwargs.get("position_bias") is not None
    return bool(weights or dropout or biased or (torch.is_grad_enabled() and query.requires_grad))


def _attend_dense(
    original: AttentionFunction,
    module: torch.nn.Module,
    query: torch.Tensor,
    view: PackedView,
    attention_mask: torch.Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The original function on decoded keys and values, under a mask that hides what single heads evicted."""
    hidden = view.evicted()
    rule = visibility(module, query.shape[2], view.shape, attention_mask, kwargs)
    dropped = hidden if rule.dropped is None or hidden is None else hidden | rule.dropped
    mask = whole_mask(replace(rule, dropped=dropped), query)
    named = getattr(module, MASKS, None)
    if named is not None:
        module.masked_key_indices = None  # type: ignore[assignment]
    try:
        whole = replace(view, for_attention=False)
        return original(module, query, whole.dense_keys(), whole.dense_values(), mask, *args, **kwargs)
    finally:
        if named is not None:
            module.masked_key_indices = named


def _attend_view(
    module: torch.nn.Module,
    query: torch.Tensor,
    view: PackedView,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    scaling, softcap, sinks = _scaling(query, kwargs), kwargs.get("softcap"), kwargs.get("s_aux")
    segments = _step_segments(module, query, view, kwargs)
    if segments is not None:
        return step.attend_step(query, segments, scaling, softcap, sinks)
    segments = view.segments()
    if view.heads is None and view.demoted is None:  # else tokens are not stored in the order of the mask
        padded = padding(module, query.shape[2], view.tokens, attention_mask, kwargs)
        if padded is not None:
            segments = padded.hide(segments, query.shape[0])
            attention_mask, kwargs = None, kwargs | {"is_causal": True}
    rule = visibility(module, query.shape[2], view.shape, attention_mask, kwargs)
    output = attend(
        query,
        segments,
        rule if view.heads is None else visibility_of_stored(rule, view.tokens, view.heads),
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
    )
    return output.transpose(1, 2).contiguous()


def _traced(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
    caps: bool,
) -> torch.Tensor:
    softcap, sinks = kwargs.get("softcap") if caps else None, kwargs.get("s_aux")
    layer: Any = module.layer_idx
    scaling = _scaling(query, kwargs)
    output: torch.Tensor = step.step_attention(query, key, value, layer, scaling, softcap, sinks)
    return output


def _scaling(query: torch.Tensor, kwargs: dict[str, Any]) -> float:
    scaling: float | None = kwargs.get("scaling")
    return query.shape[-1] ** -0.5 if scaling is None else scaling


def _step_segments(
    module: torch.nn.Module, query: torch.Tensor, view: PackedView, kwargs: dict[str, Any]
) -> list[Segment] | None:
    """The segments of a step at fixed addresses, whose one query sees every token; None for other calls."""
    if view.step is None or query.shape[2] != 1 or named_to_hide(module) is not None:
        return None
    windowed = (
        view.packed.pages and kwargs.get("sliding_window") is not None
    )  # plain layers have lengths for it
    return None if windowed else list(view.step)
