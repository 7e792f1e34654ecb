"""A decoder layer over chunks of tokens: everything in it but its attention is position-wise.

The layer's own forward runs up to its attention, which sees all tokens, and stops there. Then it runs over
each chunk of tokens, with that chunk of the attention output in place of attention. So norms, residual sums
and the feed-forward never exist for all tokens at once; only the layer's output does.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from quantpress.errors import InvalidInputError

FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "shared_expert")
"""Names of feed-forward blocks in transformers' decoder layers: position-wise, [B, T, H] to [B, T, H]."""

TOKEN_DIMENSIONS = {"position_embeddings": -2, "position_ids": -1, "cache_position": 0}
"""Arguments of decoder layers with one entry a token, and the dimension of the tokens."""

_FOR_ATTENTION = {
    "attention_mask",
    *TOKEN_DIMENSIONS,
}  # the rest of a layer passes them on without using them


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm over channels, by the name of its class."""
    return type(module).__name__.endswith("Norm")


def is_position_wise(name: str, module: nn.Module) -> bool:
    """Whether a child of a decoder layer treats each position by itself, as far as names tell."""
    return name in FEED_FORWARDS or is_norm(module) or isinstance(module, (nn.Dropout, nn.Identity))


def in_chunks(part: Callable[[int, int], Any], tokens: int, chunk_tokens: int) -> Any:
    """Compute a result one chunk of tokens at a time.

    Args:
        part: takes the first token of a chunk and the one after its last. Returns [B, t, ...], or a tuple
            that starts with it. The other items of the tuple are the same object for every chunk, or
            [B, t, ...], or flat [B * t, ...], as a mixture of experts returns its routing scores.
        tokens: T, the number of tokens.
        chunk_tokens: tokens of each chunk but the last.

    Returns:
        What `part(0, tokens)` would return.

    Raises:
        InvalidInputError: flat results of several sequences cannot be joined.
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
            raise InvalidInputError(f"flat routing scores of {batch} sequences cannot be joined; read one")
        return torch.cat(parts, dim=0 if flat else 1)
    return tuple(_joined(column, batch) for column in zip(*parts, strict=True))


def attention_name(layer: nn.Module, attention: set[nn.Module]) -> str | None:
    """The name of the child that is attention; None unless all other children are position-wise.

    Args:
        layer: any module.
        attention: all attention modules of the model.
    """
    children = dict(layer.named_children())
    found = [name for name, child in children.items() if child in attention]
    others = [name for name in children if name not in found]
    if len(found) != 1 or not all(is_position_wise(name, children[name]) for name in others):
        return None
    return found[0]


def layer_in_chunks(
    layer: nn.Module, attention: str, forward: Callable[..., Any], chunk_tokens: int
) -> Callable[..., Any]:
    """The forward of a decoder layer over chunks of tokens, wherever the result is the same.

    This needs more than `chunk_tokens` tokens, no gradients, no hooks on norms and feed-forwards, and no
    tensor arguments but those known to be meant for attention. Any other call goes to `forward`.

    Args:
        layer: a layer in which `attention_name` has found a name.
        attention: that name.
        forward: takes hidden states [B, T, H] and returns others, alone or first in a tuple.
        chunk_tokens: tokens at a time.
    """

    def chunked(*args: Any, **kwargs: Any) -> Any:
        named = {"hidden_states": args[0], **kwargs} if len(args) == 1 else kwargs
        if len(args) > 1 or not _can_be_cut(layer, attention, named, chunk_tokens):
            return forward(*args, **kwargs)
        return _output(layer, attention, named, chunk_tokens)

    return chunked


class _StoppedError(Exception):
    """The layer has reached its attention, and this is the output of attention."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Attention:
    """Takes the place of attention: computes it and stops the layer, later returns parts of its output."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.part: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.part is None:
            raise _StoppedError(self._module(*args, **kwargs))
        return self.part


def _output(layer: nn.Module, name: str, arguments: dict[str, Any], chunk_tokens: int) -> Any:
    attention = _Attention(getattr(layer, name))
    other: Any = copy.copy(layer)  # with other attention; threads may be using the layer itself
    other._modules = {**layer._modules, name: attention}
    del other.forward  # ours, which calls this function
    hidden_states = arguments["hidden_states"]
    try:
        return other.forward(**arguments)  # attention was not called
    except _StoppedError as stopped:
        attended = stopped.output

    def part(start: int, end: int) -> Any:
        alone = isinstance(attended, torch.Tensor)
        attention.part = attended[:, start:end] if alone else (attended[0][:, start:end], *attended[1:])
        return other.forward(**arguments | {"hidden_states": hidden_states[:, start:end]})

    return in_chunks(part, hidden_states.shape[1], chunk_tokens)


def _can_be_cut(layer: nn.Module, name: str, arguments: dict[str, Any], chunk_tokens: int) -> bool:
    hidden_states = arguments.get("hidden_states")
    if not isinstance(hidden_states, torch.Tensor) or hidden_states.dim() != 3:  # [B, T, H]
        return False
    if hidden_states.shape[1] <= chunk_tokens or torch.is_grad_enabled() or layer.training:
        return False
    others = [child for child_name, child in layer.named_children() if child_name != name]
    if any(child._forward_hooks or child._forward_pre_hooks for child in others):
        return False  # they would run for every chunk
    known = {"hidden_states", *_FOR_ATTENTION}
    unknown = [value for argument, value in arguments.items() if argument not in known]
    return not any(isinstance(value, (torch.Tensor, tuple, list, dict)) for value in unknown)
