"""Where a model's attention is, and which of its layers a press works on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from quantpress.presses.models.old_names import old_names
from quantpress.presses.models.positions import position_count
from quantpress.presses.models.scanning import found_once, modules_below

_SLIDING_TYPES = ("sliding_attention", "chunked_attention")
_STATE_TYPES = ("linear_attention", "mamba", "conv")


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder inside a model with a head or a multimodal model; a decoder is its own."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    return decoder if isinstance(decoder, nn.Module) else model


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of the text decoder, in layer order; empty when none is recognized."""
    return list(found_once(_attention_below, decoder_of(model)))


def _attention_below(decoder: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in modules_below(decoder)
        if "Attention" in type(module).__name__
        and isinstance(getattr(module, "layer_idx", None), int)
        and _layer_type(decoder, module) not in _STATE_TYPES
    ]


def _layer_type(decoder: nn.Module, module: nn.Module) -> str | None:
    layer_types = getattr(getattr(decoder, "config", None), "layer_types", None)
    index: Any = module.layer_idx
    return layer_types[index] if layer_types is not None and index < len(layer_types) else None


def is_sliding(module: nn.Module) -> bool:
    """Whether an attention module sees only a sliding window, or a chunk, of the text.

    The module and its config decide, not the cache: a `DynamicCache()` made without a config has only plain
    layers. A window that spans every position of the model does not count.
    """
    config = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return layer_types[module.layer_idx] in _SLIDING_TYPES
    if getattr(module, "is_sliding", False):
        return True
    window = getattr(module, "sliding_window", None) or getattr(config, "sliding_window", None)
    if window is None:
        return False
    positions = None if config is None else position_count(config)
    return positions is None or window < positions


def window_of(module: nn.Module) -> int | None:
    """How many tokens a query of a sliding-window module sees, itself included; None for other modules."""
    own = getattr(module, "sliding_window", None)
    window = getattr(getattr(module, "config", None), "sliding_window", None) if own is None else own
    return window if isinstance(window, int) else None


def in_chunks(module: nn.Module) -> bool:
    """Whether a query of this module sees only its own chunk of the text (Llama 4)."""
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    return layer_types is not None and layer_types[module.layer_idx] == "chunked_attention"


def full_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that see the whole context, which are those that a press works on."""
    return [
        module
        for module in attention_modules(model)
        if not is_sliding(module) and not getattr(module, "is_kv_shared_layer", False)
    ]


@contextmanager
def given_rotary_embedding(model: nn.Module) -> Iterator[None]:
    """Give the modules that a press works on the decoder's `rotary_emb` for a while.

    kvpress's contexts do this, and its ExpectedAttention and others read it. A press on our own base that
    asks one of them for scores never enters its context.
    """
    shared: Any = getattr(decoder_of(model), "rotary_emb", None)
    modules = () if shared is None else full_attention_modules(model)
    lacking = [module for module in modules if not hasattr(module, "rotary_emb")]
    for module in lacking:
        module.rotary_emb = shared
    try:
        yield
    finally:
        for module in lacking:
            del module.rotary_emb


@contextmanager
def hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    """Put a forward hook on every attention module that sees the whole context, for a while.

    Args:
        model: any.
        hook: as `register_forward_hook(hook, with_kwargs=True)` takes it.
    """
    handles = [
        module.register_forward_hook(hook, with_kwargs=True) for module in full_attention_modules(model)
    ]
    try:
        with old_names(decoder_of(model), attention_modules(model)):
            yield
    finally:
        for handle in handles:
            handle.remove()
