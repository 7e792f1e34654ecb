"""Lets every attention implementation of transformers read packed layers.

`install_packed_attention` wraps the entries of `ALL_ATTENTION_FUNCTIONS`, and "eager": a packed key goes to
`quantpress.kernels.attend`, anything else to the function that was there. Names, masks and models stay as
they are. An implementation registered later, or one that is not wrapped, still gets right results:
`PackedStates` decodes itself.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache import compiled_step
from quantpress.cache.states import PackedStates
from quantpress.cache.view import PackedView
from quantpress.errors import UnsupportedModelError
from quantpress.kernels.attend import Segment, Visibility, attend

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
_MARK = "_quantpress_original"
_MASKS = "masked_key_indices"
_CAUSAL = "_quantpress_causal"
IGNORES_SOFTCAP = ("sdpa",)
"""Implementations that leave out a model's softcap (Gemma 2): packed layers then leave it out too."""


def install_packed_attention() -> None:
    """Wrap every registered attention function; does nothing where it is done already.

    Import kvpress before: it wraps the same entries on import, and must be inside.
    """
    for name in list(ALL_ATTENTION_FUNCTIONS.keys()):
        function = ALL_ATTENTION_FUNCTIONS[name]
        if not hasattr(function, _MARK) and "paged" not in name and name != "flex_attention":
            ALL_ATTENTION_FUNCTIONS[name] = _dispatch(function, caps=name not in IGNORES_SOFTCAP)
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


def _dispatch(original: AttentionFunction, caps: bool = True) -> AttentionFunction:
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
    output = attend(
        query,
        view.segments(),
        visibility(module, query.shape[2], view.shape, attention_mask, kwargs),
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
    limited = kwargs.get("sliding_window") is not None or getattr(module, _MASKS, None) is not None
    return list(view.step) if view.step is not None and query.shape[2] == 1 and not limited else None


def visibility(
    module: torch.nn.Module,
    queries: int,
    shape: tuple[int, int, int],
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Visibility:
    """Who sees what, from what a model passes to its attention function.

    Args:
        module: the attention module; `is_causal` and kvpress's `masked_key_indices` are read.
        queries: Tq.
        shape: (B, Hkv, T).
        attention_mask: [B, T] (flash attention), [B or 1, 1 or Hq, Tq, >= T] bool or float, or None.
        kwargs: the attention function's keyword arguments; `is_causal` and `sliding_window` are read.

    Returns:
        The same rule for T tokens.

    Raises:
        UnsupportedModelError: a mask made for another length that is not simply causal (a padded batch whose
        layers
            keep different numbers of tokens).
    """
    tokens = shape[2]
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = kwargs.get("sliding_window")
    mask = attention_mask
    if mask is not None and mask.dim() == 4 and mask.shape[-1] != tokens:
        if not _is_causal(mask, queries):
            raise UnsupportedModelError(
                f"the attention mask is for {mask.shape[-1]} tokens, this layer keeps {tokens}, and the "
                "batch is padded; use a press that keeps as many tokens in every layer, or one context a time"
            )
        mask, causal = None, True
    elif mask is not None and mask.dim() == 4 and window is None and _is_causal(mask, queries):
        mask, causal = None, True  # no padding: kernels know this rule
    if mask is not None and mask.dim() == 2:
        mask = mask[:, -tokens:].bool()[:, None, None]
        if causal and queries > 1:
            mask = mask & causal_mask(queries, tokens, None, mask.device)
    if mask is None and window is not None and causal and tokens > window:
        mask = causal_mask(queries, tokens, window, torch.device("cpu"))[None, None]
    return Visibility(queries, tokens, causal=bool(causal), mask=mask, dropped=_dropped(module, shape))


def causal_mask(queries: int, tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[Tq, T] bool: query i sees tokens up to T - Tq + i, the last `window` of them when it is given."""
    last = torch.arange(tokens - queries, tokens, device=device).unsqueeze(1)
    token = torch.arange(tokens, device=device).unsqueeze(0)
    seen = token <= last
    return seen if window is None else seen & (token > last - window)


def _is_causal(mask: torch.Tensor, queries: int) -> bool:
    """Whether a mask hides the later queries' tokens and no others. Waits for the device once a mask."""
    known: bool | None = getattr(mask, _CAUSAL, None)
    if known is None:
        seen = mask if mask.dtype == torch.bool else mask == 0
        known = bool((seen == causal_mask(queries, mask.shape[-1], None, mask.device)).all())
        if mask.dtype != torch.bool:  # what is not hidden must not be weighted either
            known = known and bool(
                (mask.isneginf() | (mask <= torch.finfo(mask.dtype).min) | (mask == 0)).all()
            )
        setattr(mask, _CAUSAL, known)  # a model gives all its layers the same one
    return known


def _dropped(module: torch.nn.Module, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """kvpress's head-wise eviction: the (batch, head, slot) entries that must not be seen."""
    indices = getattr(module, _MASKS, None)
    if indices is None:
        return None
    dropped = torch.zeros(shape, dtype=torch.bool, device=indices[0].device)
    dropped[tuple(indices)] = True
    return dropped
