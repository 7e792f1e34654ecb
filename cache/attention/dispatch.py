"""Lets every attention implementation of transformers read packed layers.

`install_packed_attention` wraps the entries of `ALL_ATTENTION_FUNCTIONS`, and "eager": a packed key goes to
`quantpress.kernels.attend`, anything else to the function that was there. Names, masks and models stay as
they are. An implementation registered later, or one that is not wrapped, still gets right results:
`PackedStates` decodes itself.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache.attention import compiled_step
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.attention.visibility import visibility, visibility_by_place, whole_mask
from quantpress.cache.tokens.evicted_slots import MASKS, named_to_hide
from quantpress.cache.tokens.view import PackedView
from quantpress.errors import UnsupportedModelError
from quantpress.kernels.attend import Segment, Visibility, attend

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
_MARK = "_quantpress_original"
IGNORES_SOFTCAP = ("sdpa",)
"""Implementations that leave out a model's softcap (Gemma 2): packed layers then leave it out too."""


TAKES_MASKS = ("sdpa", "eager")
"""Implementations that take a mask [B, Hq, Tq, T]; in the place of others the model's eager one does."""


def install_packed_attention() -> None:
    """Wrap every registered attention function; does nothing where it is done already.

    Import kvpress before: it wraps the same entries on import, and must be inside.
    """
    for name in list(ALL_ATTENTION_FUNCTIONS.keys()):
        function = ALL_ATTENTION_FUNCTIONS[name]
        if not reads_packed(function) and "paged" not in name and name != "flex_attention":
            ALL_ATTENTION_FUNCTIONS[name] = _dispatch(
                function, caps=name not in IGNORES_SOFTCAP, masks=name in TAKES_MASKS
            )
    if "eager" not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS["eager"] = _dispatch(model_eager_attention)


def uninstall_packed_attention() -> None:
    """Put back every attention function as it was.

    Packed layers go on to work, decoded as a whole at each step.
    """
    for name in list(ALL_ATTENTION_FUNCTIONS.keys()):
        original = getattr(ALL_ATTENTION_FUNCTIONS[name], _MARK, None)
        if original is model_eager_attention:
            del ALL_ATTENTION_FUNCTIONS[name]
        elif original is not None:
            ALL_ATTENTION_FUNCTIONS[name] = original


def reads_packed(function: Any) -> bool:
    """Whether an attention function is one that `install_packed_attention` has wrapped."""
    return hasattr(function, _MARK)


def model_eager_attention(
    module: torch.nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The eager attention that the module's own modelling file defines."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no eager_attention_forward in {type(module).__module__}; "
            'load the model with attn_implementation="sdpa"'
        )
    result: tuple[torch.Tensor, torch.Tensor | None] = function(module, *args, **kwargs)
    return result


def _dispatch(original: AttentionFunction, caps: bool = True, masks: bool = True) -> AttentionFunction:
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
        if compiled_step.is_compiled_step():
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

    setattr(packed_attention, _MARK, original)
    return packed_attention


def _same_view(key: torch.Tensor, value: torch.Tensor) -> PackedView | None:
    if isinstance(key, PackedStates) and isinstance(value, PackedStates) and key.packed and value.packed:
        same = key.packed is value.packed or key.packed.shape == value.packed.shape
        return key.packed if same else None
    return None


def _needs_dense(module: torch.nn.Module, query: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Attention weights, dropout and gradients come from the original function on decoded keys and values."""
    weights = kwargs.get("output_attentions") or getattr(
        getattr(module, "config", None), "output_attentions", False
    )
    dropout = kwargs.get("dropout", 0.0) and module.training
    return bool(weights or dropout or (torch.is_grad_enabled() and query.requires_grad))


def _attend_dense(
    original: AttentionFunction,
    module: torch.nn.Module,
    query: torch.Tensor,
    view: PackedView,
    attention_mask: torch.Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The original function on decoded keys and values, what single heads have evicted masked for them."""
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
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    segments = _step_segments(module, query, view, kwargs)
    if segments is not None:
        return attend_step(query, segments, scaling, softcap, sinks)
    rule = visibility(module, query.shape[2], view.shape, attention_mask, kwargs)
    output = attend(
        query,
        view.segments(),
        rule if view.heads is None else visibility_by_place(rule, view.tokens, view.heads),
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
    )
    return output.transpose(1, 2).contiguous()


def attend_step(
    query: torch.Tensor,
    segments: Sequence[Segment],
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query over all the room of a layer at fixed addresses: [B, 1, Hq, Dv]."""
    limits = Visibility(1, sum(segment.tokens for segment in segments))
    output = attend(query, segments, limits, scaling=scaling, softcap=softcap, sinks=sinks)
    return output.transpose(1, 2).contiguous()


def _traced(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
    caps: bool,
) -> torch.Tensor:
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.get("softcap") if caps else None
    layer: Any = module.layer_idx
    sinks = kwargs.get("s_aux")
    output: torch.Tensor = compiled_step.step_attention(query, key, value, layer, scaling, softcap, sinks)
    return output


def _step_segments(
    module: torch.nn.Module, query: torch.Tensor, view: PackedView, kwargs: dict[str, Any]
) -> list[Segment] | None:
    """The segments of a step at fixed addresses, whose one query sees every token; None for other calls."""
    if view.step is None or query.shape[2] != 1 or named_to_hide(module) is not None:
        return None
    windowed = view.packed.pages and kwargs.get("sliding_window") is not None  # plain layers keep to theirs
    return None if windowed else list(view.step)
