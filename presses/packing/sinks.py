"""Detects attention sinks at the prefill: tokens that a head attends to from everywhere.

The first tokens of a text are sinks in most heads, and `sink_tokens` keeps them in 16 bits. Some heads have
others: a full stop, a line break. An error in the key of a sink moves the attention of every later query, so
these few are worth 16 bits, too. They are stored right behind the first tokens; attention does not depend on
the order of tokens that every later query sees.

docs/choosing.md has what they are worth, measured.
"""

import torch

from quantpress.presses.packing.prefill_hook import PrefillCall
from quantpress.presses.packing.queries import last_queries
from quantpress.quantization.numerics import without_autocast

_WORKSPACE_SCORES = 1 << 25  # float32 numbers: 134 MB

QUERIES = 64
"""How many of the last queries of the prefill decide by their attention."""


def places_with_sinks_first(
    call: PrefillCall,
    keys: torch.Tensor,
    first: int,
    recent: int,
    count: int,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """The place of each token, such that detected sinks follow the first tokens.

    A head's sinks are the tokens with the highest attention: the mean over the last queries and the query
    heads of its group of a softmax over the candidates,

        a_t = mean_q exp(q . k_t s) / sum_u exp(q . k_u s),   t, u between the first and the recent tokens

    Args:
        call: the prefill.
        keys: [B, Hkv, K, D], in the order of the text, after the evictors.
        first: how many first tokens stay in 16 bits in any case.
        recent: how many last tokens stay in 16 bits in any case.
        count: how many sinks to detect in each head, at most K - first - recent.
        hidden: [B, Hkv, K] bool, tokens that a head does not see; they are sinks only if it has too few
            others.

    Returns:
        [B, Hkv, K] int64, different numbers in each head; tokens go in their ascending order.

    Raises:
        UnknownAttentionError: the queries cannot be computed.
    """
    batch, heads, tokens, _ = keys.shape
    candidates = slice(first, tokens - recent)
    attention = _mean_attention(
        call, keys[:, :, candidates], None if hidden is None else hidden[:, :, candidates]
    )
    found = attention.topk(count, dim=-1).indices + first  # [B, Hkv, count]
    step, device = count + 1, keys.device  # leaves room for the sinks behind the first tokens
    places = torch.arange(0, tokens * step, step, device=device).expand(batch, heads, tokens)
    behind = torch.arange((first - 1) * step + 1, first * step, device=device).expand_as(found)
    return places.scatter(-1, found, behind)


def _mean_attention(call: PrefillCall, keys: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
    """[B, Hkv, T] float32, a few KV heads at a time, since queries x keys is large."""
    queries = last_queries(call.module, call.hidden_states, call.position_embeddings, QUERIES)
    batch, heads, _, dim = keys.shape
    grouped = queries.reshape(batch, heads, -1, dim)  # [B, Hkv, G * W, D]
    scaling = getattr(call.module, "scaling", dim**-0.5)
    attention = torch.empty(keys.shape[:3], dtype=torch.float32, device=keys.device)
    step = max(1, _WORKSPACE_SCORES // (batch * grouped.shape[2] * keys.shape[2]))
    with without_autocast():
        for some in (slice(head, head + step) for head in range(0, heads, step)):
            scores = (grouped[:, some].float() @ keys[:, some].float().mT).mul_(scaling)  # [B, h, G * W, T]
            if hidden is not None:
                scores.masked_fill_(hidden[:, some, None], torch.finfo(scores.dtype).min)
            attention[:, some] = scores.softmax(dim=-1).mean(dim=2)
    return attention
