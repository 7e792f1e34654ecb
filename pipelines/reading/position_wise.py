"""What treats each position of a text by itself, and so may run over chunks of it."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from quantpress.errors import InvalidInputError

# Names of feed-forward blocks in transformers' decoder layers; each maps [B, T, H] to [B, T, H] by position.
FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "shared_expert")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over channels, by the name of its class."""
    return type(module).__name__.endswith("Norm")


def is_by_position(name: str, module: nn.Module) -> bool:
    """Whether a child of a decoder layer treats each position by itself, as far as names tell."""
    return name in FEED_FORWARDS or is_norm(module) or isinstance(module, (nn.Dropout, nn.Identity))


def in_chunks(part: Callable[[int, int], Any], tokens: int, chunk_tokens: int) -> Any:
    """Put together what is computed for one chunk of tokens after the other.

    Args:
        part: from the first token of a chunk and the one behind its last to the result [B, t, ...], or to a
            tuple with it in the first place. Other places may hold the same object for every chunk, or [B,
            t, ...], or what a mixture of experts returns besides, flat [B * t, ...].
        tokens: T.
        chunk_tokens: of each chunk but the last.

    Returns:
        What `part(0, tokens)` would.

    Raises:
        InvalidInputError: flat results of several sequences.
    """
    whole = torch.empty(0, dtype=torch.float32, device="cpu")
    others: list[Iterable[Any]] = []
    single = True
    for start in range(0, tokens, chunk_tokens):
        end = min(start + chunk_tokens, tokens)
        found = part(start, end)
        single = isinstance(found, torch.Tensor)
        first, *rest = (found,) if single else found
        if start == 0:
            whole = first.new_empty(first.shape[0], tokens, *first.shape[2:])
        whole[:, start:end] = first
        others.append(rest)
        del found, first, rest
    if single:
        return whole
    return whole, *(_joined(column, whole.shape[0]) for column in zip(*others, strict=True))


def _joined(parts: tuple[Any, ...], batch: int) -> Any:
    if all(one is parts[0] for one in parts):
        return parts[0]
    if isinstance(parts[0], torch.Tensor):
        flat = parts[0].dim() < 3
        if flat and batch > 1:
            raise InvalidInputError(
                f"flat routing scores of {batch} sequences cannot be put together; read one"
            )
        return torch.cat(parts, dim=0 if flat else 1)
    return tuple(_joined(column, batch) for column in zip(*parts, strict=True))
