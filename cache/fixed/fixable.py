"""Which caches can be used at fixed addresses: the rules, and the reasons they give against a cache."""

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache

from quantpress.cache import host
from quantpress.cache.fixed.plain import is_plain
from quantpress.cache.layer import PackedLayer
from quantpress.rule import Found, Rule, reasons


def unfixable(cache: Cache) -> list[str]:
    """Every reason why a cache cannot be used at fixed addresses now; empty if it can."""
    return reasons(CACHE_RULES, cache)


def _unknown_layers(cache: Cache) -> Found:
    kinds = {
        index: type(layer).__name__
        for index, layer in enumerate(getattr(cache, "layers", ()))
        if not (isinstance(layer, PackedLayer) or is_plain(layer)) or isinstance(layer, host.LINEAR_LAYER)
    }
    shown = ", ".join(map(str, [*kinds][:8])) + (", ..." if len(kinds) > 8 else "")
    return {"layers": shown, "kind": next(iter(kinds.values()))} if kinds else None


def _first(cache: Cache, applies: Callable[[Any], bool]) -> Found:
    indices = (index for index, layer in enumerate(getattr(cache, "layers", ())) if applies(layer))
    index = next(indices, None)
    return None if index is None else {"layer": index}


def _has_no_page(layer: Any) -> bool:
    if not isinstance(layer, PackedLayer):
        return False
    tokens = layer.tokens  # pages of demoted tokens do not count: none is ever appended to them
    return tokens is None or tokens.packed_tokens == tokens.demoted_tokens


def _is_empty(layer: Any) -> bool:
    return is_plain(layer) and not layer.get_seq_length()


CACHE_RULES = (
    Rule("the cache has no layers", lambda cache: not getattr(cache, "layers", ()), lasting=False),
    Rule("the cache is offloaded", lambda cache: bool(getattr(cache, "offloading", False))),
    Rule(
        "a head-wise press masks tokens of the cache instead of removing them",
        lambda cache: bool(getattr(cache, "masked", None)),
    ),
    Rule("layers {layers} of the cache are {kind}s", _unknown_layers),
    Rule(
        "layer {layer} of the cache has too few tokens to pack any",
        lambda cache: _first(cache, _has_no_page),
        lasting=False,
    ),
    Rule("layer {layer} of the cache has no tokens", lambda cache: _first(cache, _is_empty), lasting=False),
)
"""Every rule; the subject is a `Cache`."""
