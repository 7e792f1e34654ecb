"""Going on from a cache whose length is not the number of tokens seen: the positions after an eviction."""

import torch
from transformers.cache_utils import Cache

from quantpress.cache.layer import PackedLayer
from quantpress.errors import InvalidInputError


def continue_inputs(
    cache: Cache,
    input_ids: torch.Tensor,
    *,
    tokens_seen: int | None = None,
    history: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Inputs for `model.generate` or `model(...)` that go on from an evicted, packed or plain cache.

    transformers takes the cache's length for the next position. After an eviction the cache is shorter than
    the text it has read, and `generate` would feed old tokens again at wrong positions. This sets positions
    from the tokens seen and cache slots from the tokens kept.

    Args:
        cache: what the context was read into; every batch entry unpadded.
        input_ids: [B, N] int64, the new tokens only.
        tokens_seen: tokens read so far. Left out, it is taken from a `PackedLayer`; a plain cache that
            was evicted must say it.
        history: [B, K] ids put in front, K the tokens kept: assisted and prompt-lookup decoding need them,
            since they crop the cache to the length of the ids. They are not fed to the model.

    Returns:
        input_ids [B, (K +) N], attention_mask [B, K + N], position_ids [B, N], cache_position [N].

    Raises:
        InvalidInputError: input_ids is not [B, N] with N >= 1, or tokens_seen is less than the tokens kept.

    Example:
        >>> # with press(model): model(context_ids, past_key_values=cache)
        >>> # model.generate(**continue_inputs(cache, question_ids), past_key_values=cache)
    """
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise InvalidInputError(
            f"input_ids has shape {tuple(input_ids.shape)}; give [batch, new tokens], at least one token"
        )
    kept = cache.get_seq_length()
    if tokens_seen is None:
        tokens_seen = next(
            (layer.tokens_seen for layer in cache.layers if isinstance(layer, PackedLayer)), kept
        )
    if tokens_seen < kept:
        raise InvalidInputError(
            f"tokens_seen is {tokens_seen}, but the cache keeps {kept} tokens; give the tokens read so far"
        )
    batch, new = input_ids.shape
    device = input_ids.device
    positions = torch.arange(tokens_seen, tokens_seen + new, device=device)
    if history is not None:
        if history.shape != (batch, kept):
            raise InvalidInputError(
                f"history has shape {tuple(history.shape)}; give one id per kept token, {(batch, kept)}"
            )
        input_ids = torch.cat([history.to(device), input_ids], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones(batch, kept + new, dtype=torch.long, device=device),
        "position_ids": positions.expand(batch, new),
        "cache_position": torch.arange(kept, kept + new, device=device),
    }
