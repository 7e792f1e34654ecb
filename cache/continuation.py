"""Positions for continuing from an evicted cache, whose length is not the number of tokens seen."""

import torch
import transformers
from transformers.cache_utils import Cache

from quantpress.cache import host
from quantpress.cache.layer import PackedLayer
from quantpress.errors import InvalidInputError


def continue_inputs(
    cache: Cache,
    input_ids: torch.Tensor,
    *,
    tokens_seen: int | None = None,
    history: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Inputs for `model.generate` or `model(...)` to continue from an evicted, packed or plain cache.

    transformers uses the length of the cache as the next position. After an eviction the cache is shorter
    than the text it has read, and `generate` would feed old tokens again at wrong positions. This function
    derives positions from the tokens seen, and cache slots from the tokens kept.

    Args:
        cache: the cache that has read the context; no batch entry may be padded.
        input_ids: [B, N] int64, the new tokens only.
        tokens_seen: number of tokens read so far; None: read from a `PackedLayer` of the cache. Required for
            a plain cache after an eviction.
        history: [B, K] ids to put in front, K the number of tokens kept. Assisted and prompt-lookup decoding
            need them, because they crop the cache to the length of the ids. They are not fed to the model.
            Later versions of transformers than 5.2 feed them, which gives wrong tokens, and are refused.

    Returns:
        A dict with input_ids [B, (K +) N], attention_mask [B, K + N], position_ids [B, N] and
        cache_position [N].

    Raises:
        InvalidInputError: input_ids is not [B, N] with N >= 1, tokens_seen is less than the number of tokens
            kept, history is not [B, K], or it is given to a transformers that would feed it.

    Example:
        >>> # with press(model): model(context_ids, past_key_values=cache)
        >>> # model.generate(**continue_inputs(cache, question_ids), past_key_values=cache)
    """
    if history is not None and host.feeds_again():
        raise InvalidInputError(
            f"assisted decoding of transformers {transformers.__version__} feeds a filled cache its history "
            "again, which gives wrong tokens: leave out history and decode token by token, or use "
            "TextGenerationPipeline or quantpress.enable, which feed new tokens only"
        )
    return inputs_after(cache, input_ids, tokens_seen=tokens_seen, history=history)


def inputs_after(
    cache: Cache,
    input_ids: torch.Tensor,
    *,
    tokens_seen: int | None = None,
    history: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """`continue_inputs` for callers that see to it that the history is not fed again.

    Raises:
        InvalidInputError: as there, but for a transformers that feeds the history.
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
        if host.feeds_again():  # an assistant reads the history at these positions
            positions = torch.arange(tokens_seen - kept, tokens_seen + new, device=device)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones(batch, kept + new, dtype=torch.long, device=device),
        "position_ids": positions.expand(batch, -1),
    }
    if host.CALLS_TAKE_PLACES:
        inputs[host.PLACES] = torch.arange(kept, kept + new, device=device)
    return inputs
