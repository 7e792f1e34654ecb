"""Who sees what: from the masks that models and kvpress use to the rule that attention follows."""

from dataclasses import replace
from typing import Any

import torch

from quantpress.cache.attention.causal import LeftPadding, causal_mask, left_padding
from quantpress.cache.tokens.evicted_slots import named_to_hide
from quantpress.cache.tokens.head_lengths import HeadLengths
from quantpress.errors import UnsupportedModelError
from quantpress.kernels.attend import Visibility
from quantpress.kernels.attend.operands import additive


def visibility(
    module: torch.nn.Module,
    queries: int,
    shape: tuple[int, int, int],
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> Visibility:
    """Who sees what, from what a model passes to its attention function.

    Args:
        module: the attention module; `is_causal` and kvpress's `masked_key_indices` are read.
        queries: Tq.
        shape: (B, Hkv, T).
        attention_mask: [B, T] (flash attention), [B or 1, 1 or Hq, Tq, >= T] bool or float, or None.
        kwargs: the attention function's keyword arguments; `is_causal` and `sliding_window` are read.

    Returns:
        The same rule for T tokens.

    Raises:
        UnsupportedModelError: the mask was made for another length and is not simply causal (a padded batch
            whose layers keep different numbers of tokens).
    """
    tokens = shape[2]
    causal = _is_causal(module, kwargs)
    window = kwargs.get("sliding_window")
    mask = attention_mask
    if mask is not None and mask.dim() == 4 and mask.shape[-1] != tokens:
        if not _is_plain(mask, queries):
            raise UnsupportedModelError(
                f"the attention mask is for {mask.shape[-1]} tokens, this layer keeps {tokens}, and the "
                "batch is padded; use a press that keeps as many tokens in every layer, or one context a time"
            )
        mask, causal = None, True
    elif mask is not None and mask.dim() == 4 and window is None and _is_plain(mask, queries):
        mask, causal = None, True  # no padding: kernels know this rule
    if mask is not None and mask.dim() == 2:
        mask = mask[:, -tokens:].bool()[:, None, None]
        if causal and queries > 1:
            mask = mask & causal_mask(queries, tokens, None, mask.device)
    if mask is None and window is not None and causal and tokens > window:
        mask = causal_mask(queries, tokens, window, torch.device("cpu"))[None, None]
    return Visibility(queries, tokens, causal=causal, mask=mask, dropped=_dropped(module, shape))


def padding(
    module: torch.nn.Module,
    queries: int,
    tokens: int,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> LeftPadding | None:
    """What a mask hides in front of each sequence of a batch, if that and the causal rule are all it says.

    The arguments are those of `visibility`, with T in place of the shape.
    """
    if attention_mask is None or kwargs.get("sliding_window") is not None:
        return None
    if attention_mask.dim() == 2 and queries > 1 and not _is_causal(module, kwargs):
        return None
    if attention_mask.dim() == 4 and attention_mask.shape[-1] != tokens:
        return None
    return left_padding(attention_mask, queries, tokens)


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _is_plain(mask: torch.Tensor, queries: int) -> bool:
    """Whether a mask of four dimensions is causal and hides nothing else."""
    found = left_padding(mask, queries, mask.shape[-1])
    return found is not None and not found.most


def _dropped(module: torch.nn.Module, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """kvpress's head-wise eviction: the (batch, head, slot) entries that must not be seen."""
    indices = named_to_hide(module)
    if indices is None:
        return None
    dropped = torch.zeros(shape, dtype=torch.bool, device=indices[0].device)
    dropped[tuple(indices)] = True
    return dropped


def visibility_of_stored(rule: Visibility, slots: int, heads: HeadLengths) -> Visibility:
    """The same rule for the tokens that a layer stores, where heads keep different ones.

    Args:
        rule: for the slots that the layer counts.
        slots: how many there are.
        heads: which of the stored tokens each head keeps.

    Raises:
        UnsupportedModelError: the mask hides, or weights, tokens of the part that was evicted from.
        InvalidInputError: more slots are named there than were evicted.
    """
    stored = slots - heads.evicted
    known = slots - heads.whole_from  # slots at the end that every head stores
    mask, dropped = rule.mask, rule.dropped
    if mask is not None:
        before = mask[..., : heads.whole_from]
        if not bool(before.all() if before.dtype == torch.bool else (before == 0).all()):
            raise UnsupportedModelError(
                "the attention mask hides or weights some of the first "
                f"{heads.whole_from} tokens, of which single heads have evicted some; read contexts of equal "
                "length, without padding"
            )
        front = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
        mask = torch.cat(
            [front(*mask.shape[:-1], stored - known), mask[..., heads.whole_from : slots]], dim=-1
        )
    if dropped is not None:
        heads.check_named(dropped)
        none = dropped.new_zeros(*dropped.shape[:2], stored - known)
        dropped = torch.cat([none, dropped[..., heads.whole_from :]], dim=-1)
    return replace(rule, tokens=stored, mask=mask, dropped=dropped)


def whole_mask(rule: Visibility, query: torch.Tensor) -> torch.Tensor:
    """A rule as a mask to add to scores: [B, Hq, Tq, T] in the query's dtype."""
    batch, query_heads, queries, _ = query.shape
    heads = 1 if rule.dropped is None else rule.dropped.shape[1]
    limit = rule.bias(0, rule.tokens, (batch, heads, query_heads // heads, queries), query.device)
    whole = torch.zeros(
        batch, heads, query_heads // heads, queries, rule.tokens, dtype=torch.float32, device=query.device
    )
    whole = whole if limit is None else whole + limit
    if rule.mask is None and rule.causal:
        whole = whole + additive(causal_mask(queries, rule.tokens, None, query.device))
    lowest = torch.finfo(query.dtype).min
    return whole.clamp(min=lowest).to(query.dtype).flatten(1, 2)
