"""How far attention over a compressed context is from attention over the context, per layer and head.

The queries are those of the uncompressed model right after the context, the same for every arm. So an error
is this layer's own and not inherited from the layers below.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from quantpress.cache import CacheMemory
from quantpress.cache.attention.states import PackedStates
from quantpress.evaluation.divergence.reference import AttentionCall, Reference, attend
from quantpress.evaluation.divergence.teacher_forcing import kl_divergence
from quantpress.quantization.numerics import in_named_dtypes

Table = list[list[float]]


@dataclass(frozen=True)
class AttentionError:
    """Errors of one document, [layers][query heads].

    Args:
        layers: indices of the layers.
        output: |o' - o| / |o| over all queries of a head.
        divergence: mean KL(attention || compressed attention) over the queries, in nats; None where tokens
            were evicted or moved, because the two then weigh different tokens.
    """

    layers: list[int]
    output: Table
    divergence: Table | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values of six digits, for JSON."""
        rounded = {"output": _rounded(self.output)}
        return {
            "layers": self.layers,
            **rounded,
            "kl": None if self.divergence is None else _rounded(self.divergence),
        }


def attention_errors(
    model: PreTrainedModel, reference: Reference, cache: Cache, memory: CacheMemory, in_order: bool = True
) -> list[AttentionError]:
    """Compare attention over the context layer by layer, before anything is appended to the cache.

    Args:
        model: the model after reading the context (with the masks that head-wise presses set on it).
        reference: the same documents read without compression, with attention calls.
        cache: the compressed context.
        memory: memory report of the cache.
        in_order: whether the cache holds tokens in the order of the text.

    Returns:
        One entry for each document of the batch.
    """
    outputs, divergences = [], []
    for layer, call in reference.attention.items():
        held: Any = cache.layers[layer]
        outputs.append(_output_error(model, call, held.keys, held.values))
        kept_all = memory.layers[layer].tokens_kept == call.keys.shape[2] and not _masks(call)
        divergences.append(_attention_divergence(call, held.keys) if kept_all and in_order else None)
    layers = list(reference.attention)
    whole = [one for one in divergences if one is not None]
    everywhere = len(whole) == len(divergences)
    return [
        AttentionError(
            layers,
            [one[entry].tolist() for one in outputs],
            [one[entry].tolist() for one in whole] if everywhere else None,
        )
        for entry in range(outputs[0].shape[0] if outputs else 0)
    ]


def _output_error(
    model: PreTrainedModel, call: AttentionCall, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    exact = call.output
    assert exact is not None
    difference = attend(model, call, keys, values).float() - exact
    norms = (t.square().sum(dim=(1, 3)).sqrt() for t in (difference, exact))
    error, size = norms
    return error / size.clamp(min=torch.finfo(torch.float32).tiny)


def _attention_divergence(call: AttentionCall, keys: torch.Tensor) -> torch.Tensor:
    dense = keys.dense() if isinstance(keys, PackedStates) else keys
    return kl_divergence(_log_weights(call, call.keys), _log_weights(call, dense)).mean(-1)


@in_named_dtypes
def _log_weights(call: AttentionCall, keys: torch.Tensor) -> torch.Tensor:
    """[B, Hq, n, T] float32 log of the attention weights; a softcap and learned sinks are left out."""
    groups = call.query.shape[1] // keys.shape[1]
    scaling = call.options.get("scaling") or call.query.shape[-1] ** -0.5
    keys = keys.float().repeat_interleave(groups, dim=1)
    scores: torch.Tensor = scaling * (call.query.float() @ keys.mT)
    return scores.log_softmax(-1)


def _masks(call: AttentionCall) -> bool:
    return getattr(call.module, "masked_key_indices", None) is not None


def _rounded(table: Table) -> Table:
    return [[float(f"{value:.6g}") for value in row] for row in table]
