"""A decoder layer over chunks of tokens: all but its attention goes by position.

The layer's own forward runs up to its attention, which sees all tokens, and stops there. Then it runs over
each chunk of tokens with the output of attention in its place. So of norms, residual sums and the
feed-forward nothing but the layer's output exists for all tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quantpress.pipelines.reading.position_wise import in_chunks, is_by_position
from quantpress.pipelines.reading.query_chunks import TOKEN_DIMENSIONS

_FOR_ATTENTION = {"attention_mask", *TOKEN_DIMENSIONS}  # what the rest of a layer passes on without a look


def attention_name(layer: nn.Module, attention: set[nn.Module]) -> str | None:
    """The child of a decoder layer that is attention; None unless all others go by position.

    Args:
        layer: any module.
        attention: all attention modules of the model.
    """
    children = dict(layer.named_children())
    found = [name for name, child in children.items() if child in attention]
    others = [name for name in children if name not in found]
    if len(found) != 1 or not all(is_by_position(name, children[name]) for name in others):
        return None
    return found[0]


def layer_in_chunks(
    layer: nn.Module, attention: str, forward: Callable[..., Any], chunk_tokens: int
) -> Callable[..., Any]:
    """The forward of a decoder layer over chunks of tokens, wherever that gives the same.

    That is for more than `chunk_tokens` tokens, without gradients, where nobody has hooks on norms and
    feed-forwards, and where every tensor among the arguments is known to be meant for attention. Any other
    call goes to `forward`.

    Args:
        layer: one for which `attention_name` has found a name.
        attention: that name.
        forward: takes hidden states [B, T, H], and returns others, alone or first in a tuple.
        chunk_tokens: tokens at a time.
    """

    def chunked(*args: Any, **kwargs: Any) -> Any:
        named = {"hidden_states": args[0], **kwargs} if len(args) == 1 else kwargs
        if len(args) > 1 or not _can_be_cut(layer, attention, named, chunk_tokens):
            return forward(*args, **kwargs)
        return _output(layer, attention, named, chunk_tokens)

    return chunked


class _StoppedError(Exception):
    """The layer has come to its attention, and this is its output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Attention:
    """Takes the place of attention: computes it and stops the layer, later gives a part of the output."""

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
    shell: Any = object.__new__(
        type(layer)
    )  # the same layer but for its attention; other threads see the layer's own
    shell.__dict__.update(vars(layer), _modules={**layer._modules, name: attention})
    del shell.__dict__["forward"]
    hidden_states = arguments["hidden_states"]
    try:
        return shell.forward(**arguments)  # attention was not asked
    except _StoppedError as stopped:
        attended = stopped.output

    def part(start: int, end: int) -> Any:
        alone = isinstance(attended, torch.Tensor)
        attention.part = attended[:, start:end] if alone else (attended[0][:, start:end], *attended[1:])
        return shell.forward(**arguments | {"hidden_states": hidden_states[:, start:end]})

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
