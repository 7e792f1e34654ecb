"""Which models can be read, evicted from and packed: every rule, and `why_not`, which applies them.

check(model, PACKABLE)       raises the first reason why a model's cache cannot be packed
why_not(model, PACKABLE)     gives all of them
"""

import sys
from typing import TypeAlias

from torch import nn
from transformers.cache_utils import DynamicCache

from quantpress.cache import host
from quantpress.cache.ranks import kv_heads, ranks_of
from quantpress.errors import UnsupportedModelError
from quantpress.presses.models.attention import attention_modules, decoder_of, is_sliding
from quantpress.rule import Found, Rule, reasons

SUPPORTED_ATTENTION = ("eager", "flash_attention_2", "flash_attention_3", "sdpa")
"""Values of `attn_implementation` that packed layers work with."""

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
"""Model types that change keys or values after the cache has returned them, or share them between layers, so
that attention does not see the cache's own."""

Rules: TypeAlias = tuple[Rule, ...]


def why_not(model: nn.Module, rules: Rules) -> list[str]:
    """Every reason why something cannot be done with a model; empty when it can.

    Args:
        model: a model of transformers.
        rules: `LAYERED`, `HOOKABLE`, `EVICTABLE` or `PACKABLE`.
    """
    return reasons(rules, model)


def check(model: nn.Module, rules: Rules) -> None:
    """Refuse a model that breaks a rule.

    Raises:
        UnsupportedModelError: the first reason of `why_not`.
    """
    reasons = why_not(model, rules)
    if reasons:
        raise UnsupportedModelError(reasons[0])


def unreadable(model: nn.Module) -> str | None:
    """Why a model's attention cannot read packed layers; None when it can."""
    modules = attention_modules(model)
    if not modules:
        return "it has no decoder attention with a cache of keys and values"
    return next((reason for module in modules for reason in reasons(_READABLE, module)), None)


def _changed_after_cache(module: nn.Module) -> bool:
    if host.takes(type(module).forward, "shared_kv_states"):
        return False  # what the cache has returned is handed on to the layers that share it
    return getattr(getattr(module, "config", None), "model_type", None) in _CHANGED_AFTER_CACHE


def _caches_latents(module: nn.Module) -> bool:
    return hasattr(module, "expand_kv")


def _adds_position_bias(module: nn.Module) -> bool:
    return hasattr(module, "rel_logits_proj") or hasattr(module, "relative_position_bias")


def _own_attention_function(module: nn.Module) -> bool:
    return not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")


def _unsupported_implementation(module: nn.Module) -> str | None:
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"
    return None if implementation in SUPPORTED_ATTENTION else repr(implementation)


_WITHOUT_KEYS: Rules = (
    Rule(
        "{subject} caches one latent vector for each token, which is small already, and makes keys and "
        "values of it behind the cache",
        _caches_latents,
    ),
    Rule("{subject} adds a bias to scores that goes by cache slots", _adds_position_bias),
)
"""What packing and evicting need; the subject is an attention module."""

_READABLE: Rules = (
    Rule(
        "{subject} changes or shares keys and values after the cache has returned them", _changed_after_cache
    ),
    *_WITHOUT_KEYS,
    Rule(
        "{subject} does not call attention through transformers' ALL_ATTENTION_FUNCTIONS",
        _own_attention_function,
    ),
    Rule(
        "{subject} is not attention over a cache of keys and values",
        lambda module: getattr(module, "config", None) is None,
    ),
    Rule(
        'attn_implementation={found} cannot read packed layers (load it with attn_implementation="sdpa", or '
        f"one of {', '.join(SUPPORTED_ATTENTION)})",
        _unsupported_implementation,
    ),
)
"""The subject is an attention module."""


def _cache_of_its_own(model: nn.Module) -> str | None:
    """The class of cache that a model with other states than keys and values brings along.

    Such a class is defined beside the model, and is no DynamicCache (Jamba, Falcon H1, LFM2, ...).
    """
    parts = (model, decoder_of(model))
    dynamic = [getattr(part, "_supports_default_dynamic_cache", None) for part in parts]
    if all(not callable(supports) or supports() for supports in dynamic):
        return None
    for module in dict.fromkeys(type(part).__module__ for part in parts):
        for name, kind in vars(sys.modules[module]).items():
            defined = isinstance(kind, type) and kind.__module__ == module and name.endswith("Cache")
            if defined and not issubclass(kind, DynamicCache):
                return name
    return "cache of its own kind"


def _shares_attention(model: nn.Module) -> bool:
    own = {module.layer_idx for module in attention_modules(model)}
    layers = enumerate(host.empty_cache(model).layers)
    return any(host.keeps_tokens(layer) and index not in own for index, layer in layers)


def _split_within_heads(model: nn.Module) -> Found:
    """The numbers of KV heads and ranks where some heads would lie on two ranks."""
    ranks = ranks_of(model)
    if ranks is None or not ranks.split_heads:
        return None
    heads = kv_heads(model)
    fitting = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
    return heads % ranks.count > 0 and {"heads": heads, "ranks": ranks.count, "fitting": fitting}


def _split_in_another_way(model: nn.Module) -> bool:
    """Whether a weight is a DTensor, as newer versions of transformers have them under a `tp_plan`."""
    return ranks_of(model) is not None and any(hasattr(one, "device_mesh") for one in model.parameters())


def _encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _without_self_attention(model: nn.Module) -> bool:
    if host.is_hybrid(model):
        return not attention_modules(model)  # see `full_layers`
    inner = getattr(model, "model", None)
    layers = getattr(getattr(inner, "language_model", inner), "layers", None)
    return layers is None or any(getattr(layer, "self_attn", None) is None for layer in layers)


def _shares_keys(model: nn.Module) -> bool:
    return any(getattr(module, "is_kv_shared_layer", False) for module in attention_modules(model))


def _only_sliding(model: nn.Module) -> bool:
    modules = attention_modules(model)
    return bool(modules) and all(is_sliding(module) for module in modules)


_LATER = "" if host.HOLDS_STATES else "; hybrid models need transformers 5.17 or later"

LAYERED: Rules = (
    Rule(
        "{subject} keeps its state in a {found}, not in layers of a DynamicCache: it cannot be read into, "
        f"compressed or asked here; use model.generate without presses{_LATER}",
        _cache_of_its_own,
    ),
    Rule(
        "{subject} has {heads} KV heads, which {ranks} processes cannot share (tp_plan); start as many as "
        "divide the heads: torchrun --nproc-per-node with one of {fitting}",
        _split_within_heads,
    ),
    Rule(
        "{subject} is split by tensor parallelism into DTensors, in which single heads are not known here; "
        "load it with transformers 5.2, or by device_map",
        _split_in_another_way,
    ),
)
"""The model can read into layers of a DynamicCache."""

_SHARED = Rule(
    "layers of {subject} share attention modules, each of which fills several layers of the cache; use it "
    "without presses",
    _shares_attention,
)

_MORE = Rule(
    "the cache of {subject} has layers of {found}, which hold more than keys and values; use it without "
    "presses",
    host.layer_that_holds_more,
)

HOOKABLE: Rules = (
    *LAYERED,
    _SHARED,
    _MORE,
    Rule(
        "{subject} cannot be evicted from: {found}; use it without presses",
        lambda model: next(
            (one for module in attention_modules(model) for one in reasons(_WITHOUT_KEYS, module)), None
        ),
    ),
    Rule(
        "kvpress finds no model.model.layers[i].self_attn in {subject}; give the model with its "
        "language-model head (...ForCausalLM), or use a quantizer alone",
        _without_self_attention,
    ),
    Rule(
        "layers of {subject} read keys and values of others, and kvpress looks for each layer's own; use it "
        "without presses",
        _shares_keys,
    ),
)
"""kvpress can put its hooks on the model."""

EVICTABLE: Rules = (
    *HOOKABLE,
    Rule(
        "every layer of {subject} is a sliding window, and presses leave those to the model: nothing "
        "would be evicted; use it without presses, or set config.sliding_window=None if the context fits "
        "the window",
        _only_sliding,
    ),
)
"""Presses can evict something from the model's cache."""

PACKABLE: Rules = (
    Rule("{subject} is an encoder-decoder model; TurboQuant packs decoder-only models", _encoder_decoder),
    Rule("{subject} cannot be packed: {found}; use it without TurboQuant", unreadable),
    *LAYERED,
    _SHARED,
    _MORE,
    Rule(
        "every layer of {subject} is a sliding window, and those stay unpacked; use it without "
        "TurboQuant, or set config.sliding_window=None if the context fits the window",
        _only_sliding,
    ),
)
"""The model's cache can be packed."""
