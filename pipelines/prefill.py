"""One exact forward over a long context whose activations stay small.

Attention and presses need to see the whole prefill at once, but the wide part of a decoder layer, its feed-
forward, treats each position by itself. Run over chunks of the sequence, its intermediate tensors (three of
them, each several times the hidden size) take O(chunk) instead of O(T), and the result is the same forward:
nothing is approximated and every press still sees every token.

What stays O(T): the hidden states (residual, input and output of a layer: a few times T x hidden), queries,
keys and values of the one layer at work, and its keys and values in the cache, which a quantizing press packs
and frees before the next layer starts. With the "eager" attention implementation the T x T score matrix stays
too: use "sdpa".
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantpress.errors import InvalidInputError
from quantpress.pipelines.query_chunks import attention_in_chunks
from quantpress.presses.model_support import attention_modules, decoder_of

DEFAULT_CHUNK_TOKENS = 2048
QUERY_CHUNKS = 4  # queries are cut coarser: kernels of attention are best at 8192 and more
Cut = Callable[[Callable[..., Any], int], Callable[..., Any]]  # from a whole forward to one in chunks
# Names of feed-forward blocks in transformers' decoder layers; each maps [B, T, H] to [B, T, H] by position.
FEED_FORWARDS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "shared_expert")


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its language-modelling head, as kvpress takes it."""
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model.base_model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order; empty when the text decoder does not call them `layers`."""
    return list(getattr(decoder_of(model), "layers", ()))


@contextmanager
def chunked_prefill(model: PreTrainedModel, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> Iterator[None]:
    """While inside, feed-forwards and norms of every decoder layer run over chunks of the sequence.

    Longer sequences are cut, shorter ones (decoding) run as always. The model is as it was on exit, also
    after an exception. A model whose layers are not understood runs whole, and one warning says so.

    Args:
        model: a decoder-only model.
        chunk_tokens: tokens in a chunk, at least 1.

    Raises:
        InvalidInputError: chunk_tokens is below 1.

    Example:
        >>> # with chunked_prefill(model), press(model):
        >>> #     model.model(input_ids=context_ids, past_key_values=cache)
    """
    if chunk_tokens < 1:
        raise InvalidInputError(f"chunk_tokens is {chunk_tokens}; give 1 or more tokens a chunk")
    modules = position_wise_modules(model)
    if not modules:
        _warn_whole(
            f"{type(model).__name__} has no feed-forward block known by name ({', '.join(FEED_FORWARDS)})"
        )
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_other_forward(module, partial(_in_chunks, module), chunk_tokens))
        for module in attention_modules(model):
            queries = QUERY_CHUNKS * chunk_tokens
            stack.enter_context(_other_forward(module, partial(attention_in_chunks, module), queries))
        yield


def position_wise_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Feed-forward blocks of the text decoder and the norms beside them; empty when no name is known."""
    found = []
    for layer in decoder_of(model).modules():
        children = dict(layer.named_children())
        if any(name in FEED_FORWARDS for name in children):
            found += [child for name, child in children.items() if name in FEED_FORWARDS or _is_norm(child)]
    return found


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


@contextmanager
def _other_forward(module: nn.Module, cut: Cut, chunk_tokens: int) -> Iterator[None]:
    """Hooks of the module still run once, around the whole: only what they surround is cut."""
    own = "forward" in vars(module)  # accelerate puts one there
    whole = module.forward
    module.forward = cut(whole, chunk_tokens)
    try:
        yield
    finally:
        if own:
            module.forward = whole
        else:
            del module.forward


def _in_chunks(owner: nn.Module, forward: Callable[..., Any], chunk_tokens: int) -> Callable[..., Any]:
    def chunked(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() != 3 or hidden_states.shape[1] <= chunk_tokens:  # [B, T, H]
            return forward(hidden_states, *args, **kwargs)
        if args or kwargs:  # they might go by position too: a residual, a mask, a routing
            _warn_whole(f"{type(owner).__name__} takes more than hidden states")
            return forward(hidden_states, *args, **kwargs)
        first = forward(hidden_states[:, :chunk_tokens])
        if not isinstance(first, torch.Tensor):
            rest = hidden_states[:, chunk_tokens:].split(chunk_tokens, dim=1)
            return _joined([first, *(forward(part) for part in rest)], hidden_states.shape[0])
        result = first.new_empty(first.shape[0], hidden_states.shape[1], *first.shape[2:])
        result[:, :chunk_tokens] = first
        for start in range(chunk_tokens, hidden_states.shape[1], chunk_tokens):
            result[:, start : start + chunk_tokens] = forward(hidden_states[:, start : start + chunk_tokens])
        return result

    return chunked


def _warn_whole(reason: str) -> None:
    warnings.warn(f"{reason}: it is computed whole, with intermediate tensors for every token", stacklevel=3)


def _joined(parts: list[Any], batch: int) -> Any:
    """Put together what a mixture of experts returns beside its output: [B, t, ...] or flat [B * t, ...]."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], torch.Tensor):
        flat = parts[0].dim() < 3
        if flat and batch > 1:
            raise InvalidInputError(
                f"flat routing scores of {batch} sequences cannot be put together; read one"
            )
        return torch.cat(parts, dim=0 if flat else 1)
    return tuple(_joined(list(column), batch) for column in zip(*parts, strict=True))
