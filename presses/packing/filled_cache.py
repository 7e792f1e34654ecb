"""Packs a cache that is already filled: behind presses that evict when their context ends, or by itself."""

from typing import Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from quantpress.cache.hybrid_layer import packed_kind
from quantpress.cache.settings import LayerSettings
from quantpress.presses.models.attention import full_attention_modules
from quantpress.presses.packing.head_wise import name_slots, named_slots
from quantpress.presses.packing.prefill_hook import plain_states


class Quantizer(Protocol):
    """A press that says how each layer is stored; `TurboQuant` documents the attributes."""

    sink_tokens: int
    detect_sinks: int
    balance_window: int
    warned_of_short_context: bool

    def layer_settings(
        self, module: nn.Module, key_dim: int, value_dim: int, sink_tokens: int
    ) -> LayerSettings | None:
        """How the layer of an attention module is stored; None leaves it unpacked."""
        ...


def pack_cache(
    press: Quantizer,
    model: nn.Module,
    cache: Cache,
    query_moments: dict[int, torch.Tensor] | None = None,
    tokens_seen: int | None = None,
    sink_tokens: int | None = None,
    *,
    by_head: bool = True,
) -> None:
    """Pack every full-attention layer of a cache that is already filled.

    Tokens that a head-wise press has named on the attention modules are left out.

    Args:
        press: says how each layer is stored.
        model: the model that filled it.
        cache: changed in place, layer by layer.
        query_moments: E[q_j^2] by layer index, [B, Hkv, D] each, for channel balance; None: no balance.
        tokens_seen: positions used so far, unless a layer keeps more tokens; None: as many as each layer
            keeps.
        sink_tokens: how many of the first tokens are kept in 16 bits; None: the press's own number.
        by_head: whether to free the memory of named tokens. False: they are packed and stay named.

    Raises:
        InvalidInputError: a layer is not a plain `DynamicLayer`.
        NonFiniteError: keys or values hold NaN or infinity.
    """
    sinks = press.sink_tokens if sink_tokens is None else sink_tokens
    for module in full_attention_modules(model):
        index = int(module.layer_idx)  # type: ignore[arg-type]
        keys, values = plain_states(cache, index)
        settings = press.layer_settings(module, keys.shape[-1], values.shape[-1], sinks)
        if settings is None:
            continue
        hidden = named_slots(module, keys) if by_head else None
        with torch.no_grad():
            packed = packed_kind(cache.layers[index]).from_states(
                keys.detach(),
                values.detach(),
                settings,
                query_moment=(query_moments or {}).get(index),
                tokens_seen=max(keys.shape[2], tokens_seen or 0),
                hidden=hidden,
            )
            packed.take_over(cache.layers[index])
            cache.layers[index] = packed
        if hidden is not None:
            name_slots(module, hidden, evicted=True)
        del keys, values
