"""The memory of a context's embeddings, freed once the first decoder layer has read them.

A model's forward keeps them in a variable until its end, though nothing reads them any more. They take as
much memory as the hidden states of a layer.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantpress.presses.models.attention import decoder_of


class Watcher:
    """A forward hook that keeps nothing of what it sees.

    Args:
        call: called without arguments, once a forward.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._call()


@contextmanager
def freed_embeddings(model: PreTrainedModel, layers: list[nn.Module]) -> Iterator[None]:
    """While inside, the embeddings that a forward makes become NaN and take no memory after the first layer.

    This works for forwards that are given input ids. Nothing is freed if hooks may have kept the embeddings,
    if the first layer is given anything else, or if gradients are recorded.

    Args:
        model: decoder-only.
        layers: the decoder layers of the model.
    """
    embedding = _input_embedding(model)
    if embedding is None or not layers:
        yield
        return
    made: list[weakref.ref[torch.Tensor]] = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        alone = len(module._forward_hooks) == 1
        made[:] = [weakref.ref(output)] if alone and not torch.is_grad_enabled() else []

    def free(layer: nn.Module, args: Any, output: Any) -> None:
        hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
        if not made or any(hook is not free and not isinstance(hook, Watcher) for hook in hooks):
            return
        embeddings = made.pop()()
        states = output if isinstance(output, torch.Tensor) else output[0]
        if embeddings is None or not args or args[0] is not embeddings or _same_memory(embeddings, states):
            return
        embeddings.data = embeddings.new_full((), torch.nan).expand(embeddings.shape)

    handles = [embedding.register_forward_hook(remember), layers[0].register_forward_hook(free)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_embedding(model: PreTrainedModel) -> nn.Module | None:
    decoder: Any = decoder_of(model)
    try:
        found: nn.Module = decoder.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
