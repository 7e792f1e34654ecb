"""One exact forward over a long context whose activations stay small.

Presses need to see the whole prefill at once, but little of a decoder layer does: its feed-forward, norms
and sums treat each position by itself (`layer_chunks.py`), and a query needs no other query
(`query_chunks.py`). Run over chunks of the sequence, their tensors take O(chunk) instead of O(T) memory. The
result is the same up to rounding, and every press still sees every token.

These stay O(T): the hidden states of the layer at work (its input, normed input and output, T x hidden each),
and its keys and values, which a quantizing press packs and frees before the next layer starts. Only the
"sdpa" implementation of attention runs in chunks; "eager" also has its T x T scores.
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
from quantpress.pipelines.reading.chunk_sizes import DEFAULT_CHUNK_TOKENS, QUERY_CHUNKS
from quantpress.pipelines.reading.layer_chunks import (
    FEED_FORWARDS,
    attention_name,
    in_chunks,
    is_norm,
    layer_in_chunks,
)
from quantpress.pipelines.reading.query_chunks import attention_in_chunks
from quantpress.presses.models.attention import attention_modules, decoder_of
from quantpress.presses.models.lock import model_lock
from quantpress.presses.models.scanning import modules_below

Cut = Callable[[Callable[..., Any], int], Callable[..., Any]]  # makes a forward in chunks from a whole one


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its language-modelling head, as kvpress finds it."""
    inner = getattr(model, "model", None)
    return inner if isinstance(inner, nn.Module) else model.base_model


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers in order; empty if the text decoder does not call them `layers`."""
    return list(getattr(decoder_of(model), "layers", ()))


@contextmanager
def chunked_prefill(model: PreTrainedModel, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> Iterator[None]:
    """While inside, every decoder layer runs over chunks of the sequence.

    Sequences of at most one chunk (decoding) run as always. The model is as it was on exit, also after an
    exception. Hooks on attention modules and layers run once, around the whole. Attention runs whole if
    gradients are recorded, if the cache holds tokens already or is not a `DynamicCache`, and with attention
    implementations other than "sdpa". A model whose layers have no known form runs whole, with one warning.
    Other threads wait with what they would put on the model.

    Args:
        model: a decoder-only model.
        chunk_tokens: tokens in a chunk, at least 1; a chunk of queries in attention has four times as many.

    Raises:
        InvalidInputError: chunk_tokens is below 1.

    Example:
        >>> # with chunked_prefill(model), press(model):
        >>> #     model.model(input_ids=context_ids, past_key_values=cache)
    """
    if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise InvalidInputError(f"chunk_tokens is {chunk_tokens!r}; give 1 or more tokens a chunk")
    modules = position_wise_modules(model)
    if not modules:
        _warn_whole(
            f"{type(model).__name__} has no feed-forward block known by name ({', '.join(FEED_FORWARDS)})"
        )
    with model_lock(model), ExitStack() as stack:
        for module in modules:
            stack.enter_context(_other_forward(module, partial(_module_in_chunks, module), chunk_tokens))
        attention = attention_modules(model)
        for module in attention:
            cut = partial(attention_in_chunks, module)
            stack.enter_context(_other_forward(module, cut, QUERY_CHUNKS * chunk_tokens))
        for layer in modules_below(decoder_of(model)):
            name = attention_name(layer, set(attention))
            if name is not None and "forward" not in vars(layer):
                stack.enter_context(
                    _other_forward(layer, partial(layer_in_chunks, layer, name), chunk_tokens)
                )
        yield


def position_wise_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Feed-forward blocks of the text decoder, norms beside them, and the last norm; empty if unknown."""
    decoder, found = decoder_of(model), []
    for layer in modules_below(decoder):
        children = dict(layer.named_children())
        if any(name in FEED_FORWARDS for name in children):
            found += [child for name, child in children.items() if name in FEED_FORWARDS or is_norm(child)]
    return found + [child for child in decoder.children() if found and is_norm(child)]


@contextmanager
def _other_forward(module: nn.Module, cut: Cut, chunk_tokens: int) -> Iterator[None]:
    """Replace a module's forward. Its hooks still run once, around all chunks."""
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


def _module_in_chunks(owner: nn.Module, forward: Callable[..., Any], chunk_tokens: int) -> Callable[..., Any]:
    def chunked(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.dim() != 3 or hidden_states.shape[1] <= chunk_tokens:  # [B, T, H]
            return forward(hidden_states, *args, **kwargs)
        if args or kwargs:  # a residual, a mask or a routing might need cutting too
            _warn_whole(f"{type(owner).__name__} takes more than hidden states")
            return forward(hidden_states, *args, **kwargs)
        return in_chunks(
            lambda start, end: forward(hidden_states[:, start:end]), hidden_states.shape[1], chunk_tokens
        )

    return chunked


def _warn_whole(reason: str) -> None:
    warnings.warn(f"{reason}: it is computed whole, with intermediate tensors for every token", stacklevel=3)
