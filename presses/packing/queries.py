"""Queries and keys of a prefill after RoPE, computed again from the hidden states.

Attention modules project by `q_proj` and `k_proj`, or by one `qkv_proj`, and the modelling file of each model
knows how it rotates. The result is checked: keys computed here must equal the keys in the cache.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from quantpress.deferred import deferred_checks, judge
from quantpress.kernels.moments import query_moment as moment_of_queries
from quantpress.kernels.moments.reference import agree_reference

PositionEmbeddings = tuple[torch.Tensor, torch.Tensor]

_CHECKED_TOKENS = 8
_TOLERANCE = 0.02  # relative; 16-bit products of other shapes differ by less


class UnknownAttentionError(Exception):
    """The queries of an attention class cannot be computed from hidden states; never reaches the user."""


def query_moment(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: PositionEmbeddings | None,
    kv_heads: int,
    window: int,
    last_keys: torch.Tensor | None,
    on_mismatch: Callable[[UnknownAttentionError], None] | None = None,
) -> torch.Tensor:
    """E[q_j^2] of the last queries of a prefill, after RoPE, averaged over the query heads of each KV head.

    Args:
        module: attention module.
        hidden_states: [B, N, hidden], its input.
        position_embeddings: cos and sin, [B, N, rotary dim] each.
        kv_heads: Hkv.
        window: how many of the last queries to look at.
        last_keys: [B, Hkv, <= N, D] keys of the last tokens of the prefill, to check the computation against;
            None: no check.
        on_mismatch: called with the reason where a deferred check finds other keys; None: raises it.

    Returns:
        [B, Hkv, D] float32; 0, which means no balance, where a deferred check finds other keys.

    Raises:
        UnknownAttentionError: it is not known how the class projects or rotates.
    """
    inputs = module, hidden_states, position_embeddings, window
    computed = actual = None
    if last_keys is None:
        queries = last_queries(*inputs)
    else:
        queries, computed = _rotated(*inputs, "q", "k")
        computed, actual = _newest(computed, last_keys, window)
    moment, agree = moment_of_queries(queries, kv_heads, computed, actual, _TOLERANCE)
    if agree is not None:
        judge(partial(_check_agreement, on_mismatch if deferred_checks() is not None else None), agree)
    return moment


def last_queries(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: PositionEmbeddings | None,
    window: int,
) -> torch.Tensor:
    """The last queries of a prefill, after RoPE: [B, Hq, <= window, D] in the model's dtype.

    Raises:
        UnknownAttentionError: it is not known how the class projects or rotates.
    """
    return _rotated(module, hidden_states, position_embeddings, window, "q")[0]


def recomputed_keys(
    module: nn.Module, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
) -> torch.Tensor:
    """Keys of every token of a prefill, after RoPE: [B, Hkv, N, D] in the model's dtype.

    Raises:
        UnknownAttentionError: it is not known how the class projects or rotates.
    """
    return _rotated(module, hidden_states, position_embeddings, hidden_states.shape[1], "k")[0]


def _rotated(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: PositionEmbeddings | None,
    window: int,
    *sides: str,
) -> list[torch.Tensor]:
    """Queries ("q") or keys ("k") of the last tokens, or both, after RoPE: [B, heads, W, D] each."""
    rotate: Any = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if rotate is None and position_embeddings is not None:
        raise UnknownAttentionError("its rotary embedding is not known")
    try:
        hidden_states = hidden_states[:, -window:]
        states = [projected(module, hidden_states, side) for side in sides]
        if position_embeddings is None:
            return states  # attention without RoPE; `check_keys` finds out where that is wrong
        cos, sin = (table[:, -window:] for table in position_embeddings)
        return _rotate(rotate, states, cos, sin)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        raise UnknownAttentionError(str(error)) from error


def _rotate(
    rotate: Any, states: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> list[torch.Tensor]:
    """Rotate all channels, or those that the tables cover: models differ in where they cut them out."""
    part = cos.shape[-1]
    first, second = states[0], states[1] if len(states) > 1 else states[0][:, :1]
    try:
        whole = rotate(first, second, cos, sin)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if part >= first.shape[-1]:
            raise
        turned = rotate(first[..., :part], second[..., :part], cos, sin)
        pairs = zip(turned, (first, second), strict=True)
        whole = [torch.cat([some, every[..., part:]], dim=-1) for some, every in pairs]
    return list(whole[: len(states)])


def _project(module: Any, hidden_states: torch.Tensor, side: str) -> torch.Tensor:
    """The projection of hidden states [B, W, hidden] to queries or keys, [B, heads, W, D], without a norm."""
    head_dim, query_heads = module.head_dim, module.config.num_attention_heads
    if hasattr(module, "qkv_proj"):  # queries of all heads, then keys, then values
        queries, rest = module.qkv_proj(hidden_states).tensor_split([query_heads * head_dim], dim=-1)
        flat = rest[..., : module.config.num_key_value_heads * head_dim] if side == "k" else queries
    elif side == "k":
        flat, factor = module.k_proj(hidden_states), getattr(module, "key_multiplier", None)  # of Falcon-H1
        flat = flat if factor is None else flat * factor
    else:
        flat = module.q_proj(hidden_states)
        if flat.shape[-1] == 2 * query_heads * head_dim:  # the second half of each head is a gate
            flat = flat.unflatten(-1, (query_heads, -1))[..., :head_dim].flatten(-2)
    states: torch.Tensor = flat.unflatten(-1, (-1, head_dim))
    return states.transpose(1, 2)


def projected(module: nn.Module, hidden_states: torch.Tensor, side: str) -> torch.Tensor:
    """Queries or keys before RoPE, [B, heads, W, D]."""
    states = _project(module, hidden_states, side)
    norm: Any = getattr(module, f"{side}_norm", None) or getattr(module, f"{side}_layernorm", None)
    if norm is None:
        return states
    by_token = states.transpose(1, 2)  # [B, W, heads, D], as models apply it
    all_heads = norm.weight.dim() == 1 and norm.weight.numel() != states.shape[-1]
    normed: torch.Tensor = norm(by_token.flatten(2)).view(by_token.shape) if all_heads else norm(by_token)
    return normed.transpose(1, 2)


def check_keys(
    module: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: PositionEmbeddings | None,
    keys: torch.Tensor,
) -> None:
    """Compare the last keys with those in the cache, except channels that a press has set to zero (ThinK).

    Args:
        module: attention module.
        hidden_states: [B, N, hidden], its input.
        position_embeddings: cos and sin, [B, N, rotary dim] each.
        keys: [B, Hkv, <= N, D], those of the last tokens of the prefill.

    Raises:
        UnknownAttentionError: they differ, or cannot be computed.
    """
    (computed,) = _rotated(module, hidden_states, position_embeddings, _CHECKED_TOKENS, "k")
    computed, actual = _newest(computed, keys, _CHECKED_TOKENS)
    judge(partial(_check_agreement, None), agree_reference(computed, actual, _TOLERANCE))


def _newest(computed: torch.Tensor, actual: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last keys of both, which are compared."""
    count = min(_CHECKED_TOKENS, window, actual.shape[2])
    computed, actual = computed[:, :, -count:], actual[:, :, -count:]
    if computed.shape != actual.shape:
        raise UnknownAttentionError(f"its keys have shape {tuple(actual.shape)}, not {tuple(computed.shape)}")
    return computed, actual


def _check_agreement(on_mismatch: Callable[[UnknownAttentionError], None] | None, agree: list[float]) -> None:
    if not all(agree):
        reason = UnknownAttentionError("keys computed from its hidden states are not those in its cache")
        if on_mismatch is None:
            raise reason
        on_mismatch(reason)
