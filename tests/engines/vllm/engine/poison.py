"""NaN where nothing was written: an engine that reads a stale or unwritten place answers NaN.

On a CPU vLLM allocates its cache as zeros, which would hide such a read: a zero is a key like any other.
"""

from __future__ import annotations

from typing import Any


def layers(config: Any) -> list[Any]:
    """The attention layers of the engine with this `VllmConfig`."""
    found = config.compilation_config.static_forward_context.values()
    return [layer for layer in found if getattr(layer, "kv_cache", None) is not None]


def poison_blocks(config: Any, blocks: list[int] | None = None) -> None:
    """Fill blocks of vLLM's cache, all of them by default, with bytes that are NaN in every float dtype."""
    for layer in layers(config):
        if blocks is None:
            layer.kv_cache.fill_(255)
        else:
            layer.kv_cache[blocks] = 255


def poison_pools(config: Any) -> None:
    """Fill the pools of recent tokens and sinks, which quantpress keeps beside vLLM's cache."""
    for layer in layers(config):
        for pool in (*layer.impl.store.recent, *layer.impl.store.sinks):
            pool.fill_(float("nan"))
