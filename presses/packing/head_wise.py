"""The tokens that single heads must not see, which head-wise presses name on attention modules.

kvpress names them as (batch, head, slot) in `masked_key_indices`, 24 bytes each, and keeps them in the cache.
A packed layer forgets them, head by head; their names remain, one bit each, for whoever wants to read them.
"""

from typing import Any

import torch
from torch import nn

from quantpress.cache.tokens.evicted_slots import MASKS, EvictedSlots, named_to_hide
from quantpress.errors import InvalidInputError


def named_slots(module: nn.Module, keys: torch.Tensor) -> torch.Tensor | None:
    """[B, Hkv, T] bool, True for the slots named on an attention module; None when none is named.

    Args:
        module: the attention module.
        keys: [B, Hkv, T, D], those of the module's layer in the cache.

    Raises:
        InvalidInputError: the named slots belong to a longer context.
    """
    named = named_to_hide(module)
    if named is None:
        return None
    batch, head, slot = (index.to(keys.device) for index in named)
    if int(slot.max()) >= keys.shape[2]:
        raise InvalidInputError(
            f"{MASKS} names token {int(slot.max())}, but the cache holds {keys.shape[2]}; it was left by "
            f"another context: delete it from {type(module).__name__}"
        )
    hidden = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    hidden[batch, head, slot] = True
    return hidden


def name_slots(module: nn.Module, hidden: torch.Tensor, evicted: bool) -> None:
    """Name slots on an attention module, instead of those that kvpress has named.

    Args:
        module: the attention module.
        hidden: [B, Hkv, T] bool.
        evicted: whether the layer has forgotten these tokens. False: attention is to hide them.
    """
    named: Any = EvictedSlots(hidden) if evicted else hidden.nonzero(as_tuple=True)
    module.masked_key_indices = named
