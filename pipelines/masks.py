"""Attention masks for layers that keep different numbers of tokens.

transformers builds one mask, from the length of one layer. PyramidKV, ChunkKV and others keep a different
number in every layer, and a question of several tokens then fails in attention. Rows and columns of a causal
mask are aligned at its bottom right corner, so it fits another length once its left end is cut, or drawn out.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from quantpress.presses.models.support import attention_modules


@contextmanager
def fitted_masks(model: PreTrainedModel, cache: Cache, new_tokens: int | None = None) -> Iterator[None]:
    """While inside, every attention module gets the mask it is given at the width of its own cache layer.

    Does nothing when all layers keep the same number of tokens.

    Args:
        model: decoder-only.
        cache: holds an unpadded context.
        new_tokens: of the one forward inside, if known: a single token has no mask.
    """
    with ExitStack() as stack:
        if new_tokens != 1 and len({layer.get_seq_length() for layer in cache.layers}) > 1:
            for module in attention_modules(model):
                stack.callback(module.register_forward_pre_hook(_fit_mask, with_kwargs=True).remove)
        yield


def _fit_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or cache is None:
        return None
    width, _ = cache.layers[module.layer_idx].get_mask_sizes(kwargs["cache_position"])
    return args, kwargs | {"attention_mask": fit_width(mask, width)}


def fit_width(mask: torch.Tensor, width: int) -> torch.Tensor:
    """The same mask for another number of tokens.

    Args:
        mask: [B, 1, Tq, T] bool or float, of consecutive positions.
        width: the T wanted.

    Example:
        >>> fit_width(torch.tensor([[[[True, True, False], [True, True, True]]]]), 4)[0, 0].int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    missing = width - mask.shape[-1]
    if missing > 0:
        return torch.cat([mask[..., :1].expand(*mask.shape[:-1], missing), mask], dim=-1)
    return mask[..., -missing:]
