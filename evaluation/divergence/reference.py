"""What the uncompressed model predicts for a document, and the queries with which it reads the context."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache.attention.functions import (
    AttentionFunction,
    FunctionWrapper,
    model_eager_attention,
)
from quantpress.evaluation.divergence.teacher_forcing import float32_logits
from quantpress.presses.models.attention import attention_modules

_PASSED_ON = ("scaling", "softcap", "s_aux")
_RANK = 2  # outside of packed attention and of live patches


@dataclass(frozen=True)
class AttentionCall:
    """One layer's queries behind the context, and the context's keys and values, uncompressed.

    Args:
        module: the attention module.
        query: [B, Hq, n, D].
        keys: [B, Hkv, T, D].
        values: [B, Hkv, T, Dv].
        options: scaling, softcap and learned sinks, as the model passed them.
        output: [B, n, Hq, Dv] float32, of these queries over the context alone; None until it is computed.
    """

    module: torch.nn.Module
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    options: dict[str, Any]
    output: torch.Tensor | None = None

    def of(self, entries: slice) -> "AttentionCall":
        """The same call with some of its documents."""
        query, keys, values = (t[entries] for t in (self.query, self.keys, self.values))
        output = None if self.output is None else self.output[entries]
        return replace(self, query=query, keys=keys, values=values, output=output)


@dataclass(frozen=True)
class Reference:
    """Documents read by the uncompressed model in one forward, without a cache.

    Args:
        log_probs: [B, N - 1, V] float32, of the tokens behind the first of the continuation.
        attention: by layer index; empty unless asked for. Sliding-window layers are left out.
    """

    log_probs: torch.Tensor
    attention: dict[int, AttentionCall]

    def of(self, entries: slice) -> "Reference":
        """The same for some of the documents, without a copy."""
        attention = {layer: call.of(entries) for layer, call in self.attention.items()}
        return Reference(self.log_probs[entries], attention)


def read_reference(model: PreTrainedModel, ids: torch.Tensor, context: int, queries: int = 0) -> Reference:
    """Run the whole text through the uncompressed model.

    Args:
        model: decoder-only, in evaluation mode.
        ids: [B, T + N] int64: context and continuation.
        context: T.
        queries: how many of the queries behind the context to keep for each layer; 0 keeps no attention.

    Returns:
        The model's predictions, and its attention over the context where it was asked for.
    """
    calls: dict[int, AttentionCall] = {}
    with float32_logits(model), _recorded(model, calls, context, queries):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - context).logits
    exact = {
        layer: replace(call, output=attend(model, call, call.keys, call.values).float())
        for layer, call in calls.items()  # now, before a head-wise press masks anything
    }
    return Reference(logits[:, :-1].float().log_softmax(-1), exact)


@contextmanager
def _recorded(
    model: PreTrainedModel, calls: dict[int, AttentionCall], context: int, queries: int
) -> Iterator[None]:
    """Record the attention calls that this thread makes in the model's layers."""
    if not queries:
        yield
        return
    own, this = set(attention_modules(model)), threading.current_thread()

    def record(function: AttentionFunction, name: str) -> AttentionFunction:
        def recording(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            mine = module in own and threading.current_thread() is this
            if mine and kwargs.get("sliding_window") is None:
                layer: Any = module.layer_idx
                calls[layer] = AttentionCall(
                    module,
                    query[:, :, context : context + queries].clone(),
                    key[:, :, :context].clone(),
                    value[:, :, :context].clone(),
                    {name: kwargs[name] for name in _PASSED_ON if name in kwargs},
                )
            return function(module, query, key, value, *args, **kwargs)

        return recording if name == model.config._attn_implementation else function

    with FunctionWrapper(record, _RANK).in_place():
        yield


def attend(
    model: PreTrainedModel, call: AttentionCall, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """The layer's attention over a context alone, packed or not, all of it visible: [B, n, Hq, Dv].

    The model itself calls the same function, so a packed cache is read as in decoding.
    """
    name = model.config._attn_implementation
    function: Any = ALL_ATTENTION_FUNCTIONS.get(name, model_eager_attention)
    options = {"dropout": 0.0, "is_causal": False, **call.options}
    output: torch.Tensor = function(call.module, call.query, keys, values, None, **options)[0]
    return output
