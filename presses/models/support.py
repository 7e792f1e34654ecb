"""Which parts of a model a press works on, and which models can be packed at all."""

import sys
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from quantpress.errors import UnsupportedModelError
from quantpress.presses.models.positions import position_count

SUPPORTED_ATTENTION = ("eager", "flash_attention_2", "flash_attention_3", "sdpa")
"""Values of `attn_implementation` that packed layers work with."""

# These change keys or values after the cache has returned them, or share them between layers, so that
# attention does not see the cache's own.
_CHANGED_AFTER_CACHE = frozenset(
    {
        "diffllama",
        "doge",
        "gemma3n",
        "gemma3n_text",
        "glm_moe_dsa",
        "idefics",
        "jetmoe",
        "longcat_flash",
        "mllama",
        "mllama_text_model",
        "moonshine",
        "moonshine_streaming",
        "youtu",
    }
)
_SLIDING_TYPES = ("sliding_attention", "chunked_attention")


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder inside a model with a head, a multimodal model, or the decoder itself."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    return decoder if isinstance(decoder, nn.Module) else model


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of the text decoder, in layer order; empty when none has a known form."""
    return [
        module
        for module in decoder_of(model).modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    ]


def is_sliding(module: nn.Module) -> bool:
    """Whether an attention module looks back over a window only.

    The module and its config decide, not the cache: a `DynamicCache()` made without a config holds plain
    layers only. A window that spans every position of the model is none.
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
    """Tokens that a query of a sliding-window module sees, itself included."""
    own = getattr(module, "sliding_window", None)
    window = getattr(getattr(module, "config", None), "sliding_window", None) if own is None else own
    return window if isinstance(window, int) else None


def in_chunks(module: nn.Module) -> bool:
    """Whether a query of this module sees its own chunk of the text only (Llama 4)."""
    layer_types = getattr(getattr(module, "config", None), "layer_types", None)
    return layer_types is not None and layer_types[module.layer_idx] == "chunked_attention"


def full_attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that see the whole context: those a press works on."""
    return [module for module in attention_modules(model) if not is_sliding(module)]


def own_cache(model: nn.Module) -> str | None:
    """The class of cache that a model with states besides keys and values brings along; None for all others.

    Such a class is defined beside the model, and is no DynamicCache (Jamba, Falcon H1, LFM2, ...).
    """
    for place in dict.fromkeys((type(model).__module__, type(decoder_of(model)).__module__)):
        for name, kind in vars(sys.modules[place]).items():
            defined = isinstance(kind, type) and kind.__module__ == place and name.endswith("Cache")
            if defined and not issubclass(kind, DynamicCache):
                return name
    return None


def unlayered(model: nn.Module) -> str | None:
    """Why a model (Jamba, Qwen3-Next, MiniMax, ...) cannot read into a DynamicCache; None when it can."""
    for part in (model, decoder_of(model)):
        dynamic: Any = getattr(part, "_supports_default_dynamic_cache", None)
        if callable(dynamic) and not dynamic():
            cache = own_cache(model) or "cache of its own kind"
            return (
                f"{type(model).__name__} keeps its state in a {cache}, not in layers of a DynamicCache: it "
                "cannot be read into, compressed or asked here; use model.generate without presses"
            )
    return None


def check_layered(model: nn.Module) -> None:
    """Refuse a model that cannot read into layers of a DynamicCache.

    Raises:
        UnsupportedModelError: names the cache that it brings along.
    """
    reason = unlayered(model)
    if reason is not None:
        raise UnsupportedModelError(reason)


def check_packable(model: nn.Module) -> None:
    """Refuse a model whose cache cannot be packed.

    Raises:
        UnsupportedModelError: the model's attention, or its attention implementation, cannot read packed
            layers, its states are in another cache than a DynamicCache, or every layer is a sliding window.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; TurboQuant packs decoder-only models"
        )
    reason = unreadable(model)
    if reason is not None:
        raise UnsupportedModelError(f"{name} cannot be packed: {reason}; use it without TurboQuant")
    check_layered(model)
    if all(is_sliding(module) for module in attention_modules(model)):
        raise UnsupportedModelError(
            f"every layer of {name} is a sliding window, and those stay unpacked; use it without TurboQuant, "
            "or set config.sliding_window=None if the context fits the window"
        )


def check_hookable(model: nn.Module) -> None:
    """Refuse a model in which kvpress cannot put its hooks, or would look for keys that layers share.

    Raises:
        UnsupportedModelError: `model.model.layers[i].self_attn` (or the same below
            `model.model.language_model`) is not there, states are in another cache than a DynamicCache, or
            layers read the keys of others.
    """
    check_layered(model)
    name = type(model).__name__
    inner = getattr(model, "model", None)
    inner = getattr(inner, "language_model", inner)
    layers = getattr(inner, "layers", None)
    if layers is None or any(getattr(layer, "self_attn", None) is None for layer in layers):
        raise UnsupportedModelError(
            f"kvpress finds no model.model.layers[i].self_attn in {name}; give the model with its "
            "language-model head (...ForCausalLM), or use a quantizer alone"
        )
    if any(getattr(module, "is_kv_shared_layer", False) for module in attention_modules(model)):
        raise UnsupportedModelError(
            f"layers of {name} read keys and values of others, and kvpress looks for each layer's own; use "
            "it without presses"
        )


def check_evictable(model: nn.Module) -> None:
    """Refuse a model that presses can evict nothing from.

    Raises:
        UnsupportedModelError: as for `check_hookable`, or every layer is a sliding window.
    """
    check_hookable(model)
    modules = attention_modules(model)
    if modules and all(is_sliding(module) for module in modules):
        raise UnsupportedModelError(
            f"every layer of {type(model).__name__} is a sliding window, and presses leave those to the "
            "model: nothing would be evicted; use it without presses, or set config.sliding_window=None if "
            "the context fits the window"
        )


def unreadable(model: nn.Module) -> str | None:
    """Why a model's attention cannot read layers of ours; None when it can."""
    modules = attention_modules(model)
    if not modules:
        return "it has no decoder attention with a cache of keys and values"
    return next((reason for reason in map(_unreadable, modules) if reason is not None), None)


def _unreadable(module: nn.Module) -> str | None:
    attention = type(module).__name__
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) in _CHANGED_AFTER_CACHE:
        return f"{attention} changes or shares keys and values after the cache has returned them"
    if not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return f"{attention} does not call attention through transformers' ALL_ATTENTION_FUNCTIONS"
    if config is None:
        return f"{attention} is not attention over a cache of keys and values"
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation not in SUPPORTED_ATTENTION:
        return (
            f"attn_implementation={implementation!r} cannot read packed layers (load it with "
            f'attn_implementation="sdpa", or one of {", ".join(SUPPORTED_ATTENTION)})'
        )
    return None
