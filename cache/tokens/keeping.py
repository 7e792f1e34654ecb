"""Keeping some of a layer's tokens and forgetting the others: codes and scales move as they are."""

import torch

from quantpress.cache.tokens.eviction import check_one_width, evict, taken
from quantpress.cache.tokens.head_pages import EvenPages
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS


def keep(tokens: PackedTokens, kept: torch.Tensor) -> None:
    """Keep selected tokens, in the order in which they are stored.

    Heads may keep different numbers of sinks, packed and recent tokens. Pages hold what is packed in all of
    them, as far as whole pages go; other packed tokens are decoded, and packed again give the same codes
    but for few, as after a crop.

    Args:
        tokens: of a layer; changed in place.
        kept: [B, Hkv, K] int64, slots, distinct within a head, in any order. A slot whose token the head has
            evicted before stays evicted.

    Raises:
        InvalidInputError: wrong dtype or shape, a slot twice, or one where no token is; or some tokens are in
            pages of fewer bits.
    """
    check_one_width(tokens)
    kept = _checked(tokens, kept)
    if not isinstance(tokens.pages, EvenPages):
        hidden = torch.ones(*kept.shape[:2], len(tokens), dtype=torch.bool, device=kept.device)
        evict(tokens, hidden.scatter_(2, kept, False), slots=kept.shape[2])
        return
    sinks, dense_from = tokens.sinks.tokens, tokens.sinks.tokens + tokens.packed
    start = int((kept < sinks).sum(-1).amax()) if kept.numel() else 0
    stop = int((kept < dense_from).sum(-1).amin()) if kept.numel() else 0
    end = start + max(0, stop - start) // PAGE_TOKENS * PAGE_TOKENS
    front, back = taken(tokens, kept[..., :start]), taken(tokens, kept[..., end:])
    codecs = tokens.settings.key_codec, tokens.settings.value_codec
    tokens.pages = tokens.pages.gather(codecs, kept[..., start:end] - sinks)
    tokens.replace_dense(front, back)


def _checked(tokens: PackedTokens, kept: torch.Tensor) -> torch.Tensor:
    heads = tokens.sinks.keys.shape[:2]
    if kept.dtype != torch.int64 or kept.dim() != 3 or kept.shape[:2] != heads:
        wanted = f"int64 [{heads[0]}, {heads[1]}, K]"
        raise InvalidInputError(f"tokens to keep must be {wanted}, got {kept.dtype} {tuple(kept.shape)}")
    ordered = kept.sort(dim=-1).values
    inside = bool(((ordered >= 0) & (ordered < len(tokens))).all())
    if not inside or not bool((ordered.diff(dim=-1) > 0).all()):
        raise InvalidInputError(f"tokens to keep must be distinct places from 0 to {len(tokens) - 1}")
    return ordered
