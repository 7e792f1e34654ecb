"""Packs a cache that is filled already: for presses that evict at the end of their context, or by itself."""

import torch
from torch import nn
from transformers.cache_utils import Cache

from quantpress.cache.layer import PackedLayer
from quantpress.presses.models.support import full_attention_modules
from quantpress.presses.packing.head_wise import name_slots, named_slots
from quantpress.presses.packing.prefill_hook import plain_states
from quantpress.presses.packing.quantizer import Quantizer


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
    """Pack every full-attention layer of a cache that is filled already.

    Tokens that a head-wise press has named on the attention modules are not packed.

    Args:
        press: says how each layer is stored.
        model: the model that filled it.
        cache: changed in place, layer by layer.
        query_moments: E[q_j^2] per layer index, [B, Hkv, D] each, for channel balance.
        tokens_seen: tokens read so far; a layer that keeps more counts its own. Left out, what each layer
            keeps.
        sink_tokens: pinned first tokens; the press's own when left out.
        by_head: False: pack named tokens too, and leave them named.

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
            cache.layers[index] = PackedLayer.from_states(
                keys.detach(),
                values.detach(),
                settings,
                query_moment=(query_moments or {}).get(index),
                tokens_seen=max(keys.shape[2], tokens_seen or 0),
                hidden=hidden,
            )
        if hidden is not None:
            name_slots(module, hidden, evicted=True)
        del keys, values
