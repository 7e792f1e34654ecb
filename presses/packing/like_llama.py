"""Models whose queries and keys kvpress computes in another way than they do.

Presses that score by queries compute them again from the hidden states, and presses that give tokens other
positions turn their keys. kvpress does both as Llama's attention does. In a model with pairs of neighbouring
channels (Cohere), a norm that kvpress does not know (OLMo 2) or layers without positions (SmolLM3), the
scores would be those of other queries, or the keys wrong.
"""

import sys
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from quantpress.deferred import judge
from quantpress.errors import UnsupportedModelError
from quantpress.kernels.moments.reference import agree_reference
from quantpress.presses.packing.prefill_hook import PrefillCall
from quantpress.presses.packing.queries import projected

_TOKENS = 8
_TOLERANCE = 0.02  # relative; 16-bit products of other shapes differ by less


def check_like_llama(call: PrefillCall, error: UnsupportedModelError, *, turned_only: bool = False) -> None:
    """Compare the newest keys of a layer, before anything is evicted, with those that kvpress computes.

    Args:
        call: the attention module's part in the prefill.
        error: what is raised where they differ.
        turned_only: compare keys that are projected and normed as the model does, and turned as kvpress does.

    Raises:
        UnsupportedModelError: at once, or when checks are deferred, at the end of the forward.
    """
    layer = call.cache.layers[call.layer_idx]
    if type(layer) is not DynamicLayer or layer.keys is None or layer.keys.shape[2] != call.tokens:
        return  # packed, quantized or evicted from: not the model's own keys any more
    actual = layer.keys[:, :, -_TOKENS:]
    computed = _as_kvpress(call, actual.shape[2], turned_only)
    if computed is None or computed.shape != actual.shape:
        raise error
    judge(partial(_refuse, error), agree_reference(computed, actual, _TOLERANCE))


def leaves_channels_out(call: PrefillCall) -> bool:
    """Whether the model rotates some of the channels only, where kvpress rotates all."""
    keys: Any = call.cache.layers[call.layer_idx].keys
    tables = call.position_embeddings
    return keys is not None and tables is not None and tables[0].shape[-1] != keys.shape[-1]


def _as_kvpress(call: PrefillCall, count: int, turned_only: bool) -> torch.Tensor | None:
    """Keys of the last tokens, [B, Hkv, count, D], as kvpress would compute them; None where it cannot."""
    states: Any = sys.modules["kvpress.utils"]
    project = partial(projected, side="k") if turned_only else states.get_prerope_key_states
    try:
        keys: torch.Tensor = project(call.module, call.hidden_states[:, -count:])
        if call.position_embeddings is None:
            return None
        cos, sin = (table[:, -count:].unsqueeze(1) for table in call.position_embeddings)
        first, second = keys.chunk(2, dim=-1)
        return keys * cos + torch.cat([-second, first], dim=-1) * sin
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None


def _refuse(error: UnsupportedModelError, agree: list[float]) -> None:
    if not all(agree):
        raise error
