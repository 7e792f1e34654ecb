"""What attention must not see: masks of the right width for each layer, and slots that single heads hide.

transformers builds one mask, from the length of one layer. PyramidKV, ChunkKV and others keep a different
number of tokens in every layer, and a question of several tokens then fails in attention. Rows and columns of
a causal mask are aligned at its bottom right corner, so it fits another length once its left end is cut or
repeated.

Head-wise presses of kvpress do not remove tokens. They name the slots to hide on each attention module, as
indices (batch, head, slot) in `masked_key_indices`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache

from quantpress.cache import host
from quantpress.cache.text_cache import TextCache
from quantpress.cache.tokens.evicted_slots import MASKS, named_to_hide
from quantpress.presses.models.attention import attention_modules

HiddenSlots = dict[int, Any]
"""Indices (batch, head, slot) by layer index."""

_MISSING: Any = object()


@contextmanager
def fitted_masks(model: nn.Module, cache: Cache, new_tokens: int | None = None) -> Iterator[None]:
    """While inside, every attention module gets its mask at the width of its own cache layer.

    Does nothing if all layers keep the same number of tokens.

    Args:
        model: decoder-only.
        cache: holds an unpadded context.
        new_tokens: tokens of the one forward inside, if known: a single token has no mask.
    """
    with ExitStack() as stack:
        if new_tokens != 1 and len({layer.get_seq_length() for layer in host.token_layers(cache)}) > 1:
            for module in attention_modules(model):
                stack.callback(module.register_forward_pre_hook(_fit_mask, with_kwargs=True).remove)
        yield


def _fit_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mask, cache = kwargs.get("attention_mask"), host.cache_in(args, kwargs)
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or cache is None:
        return None
    query = host.mask_query(mask.shape[2])
    width, _ = cache.layers[module.layer_idx].get_mask_sizes(query)  # type: ignore[index]
    return args, kwargs | {"attention_mask": fit_width(mask, width)}


def fit_width(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The same mask for another number of tokens.

    Args:
        mask: [B, 1, Tq, T] bool or float, for consecutive positions.
        width: the new T.

    Returns:
        [B, 1, Tq, width], aligned at the right.

    Example:
        >>> fit_width(torch.tensor([[[[True, True, False], [True, True, True]]]]), 4)[0, 0].int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    missing = width - mask.shape[-1]
    if missing > 0:
        return torch.cat([mask[..., :1].expand(*mask.shape[:-1], missing), mask], dim=-1)
    return mask[..., -missing:]


def hidden_slots(model: nn.Module) -> HiddenSlots:
    """The slots that attention of this model hides now; layers that hide none are left out."""
    named = {int(module.layer_idx): named_to_hide(module) for module in attention_modules(model)}  # type: ignore[arg-type]
    return {layer: slots for layer, slots in named.items() if slots is not None}


def remember_hidden_slots(model: nn.Module) -> Callable[[], None]:
    """A function that makes the model hide what it hides now, and nothing else."""
    before = [(vars(module), vars(module).get(MASKS, _MISSING)) for module in attention_modules(model)]

    def restore() -> None:
        for attributes, slots in before:
            if slots is _MISSING:
                attributes.pop(MASKS, None)
            else:
                attributes[MASKS] = slots

    return restore


@contextmanager
def hiding(model: nn.Module, slots: Mapping[int, Any]) -> Iterator[None]:
    """While inside, the model hides these slots, by layer index, in place of those that it hid before."""
    restore = remember_hidden_slots(model)
    try:
        for module in attention_modules(model):
            setattr(module, MASKS, slots.get(int(module.layer_idx)))  # type: ignore[arg-type]
        yield
    finally:
        restore()


@contextmanager
def hiding_with_cache(model: nn.Module, cache: TextCache) -> Iterator[None]:
    """While inside, the model hides what the cache says; what it hides at the end goes back to the cache."""
    with hiding(model, cache.masked):
        yield
        cache.masked = hidden_slots(model)


def repeat_hidden_slots(model: nn.Module, times: int) -> None:
    """Hide the same slots in each of `times` copies of every sequence, as `repeat_interleave` makes them."""
    for module in attention_modules(model):
        slots = named_to_hide(module)
        if slots is not None:
            batch, *rest = slots
            copies = torch.arange(times, device=batch.device)
            repeated = [index.repeat_interleave(times) for index in rest]
            setattr(module, MASKS, [(batch[:, None] * times + copies).flatten(), *repeated])
