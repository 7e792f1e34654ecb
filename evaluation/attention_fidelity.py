"""How well attention over packed keys and values follows attention over exact ones, on a real model.

For the last queries of a context, the scores q.k of every layer are computed twice: with the keys of the
model, and with the same keys as a press keeps them (packed, sinks and recent tokens in 16 bits). Each layer
sees exact inputs, so errors do not add up over layers. A softcap of the model is left out.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from quantpress.cache import PackedLayer, host
from quantpress.cache.attention.causal import causal_mask
from quantpress.errors import InvalidInputError, UnsupportedModelError, did_you_mean
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.pipelines.press_argument import AnyPress, as_press
from quantpress.pipelines.reading.chunked_prefill import backbone
from quantpress.presses.compose import Compose
from quantpress.presses.models.attention import hooked
from quantpress.presses.packing.prefill_hook import PrefillCall, plain_states, prefill_call
from quantpress.presses.packing.queries import UnknownAttentionError, last_queries
from quantpress.presses.traits import short_repr
from quantpress.presses.turboquant import TurboQuant
from quantpress.quantization.numerics import in_named_dtypes

DEFAULT_QUERIES = 64
TOP = 5


@dataclass(frozen=True)
class LayerFidelity:
    """One layer, averaged over its query heads and queries.

    Args:
        layer: index of the layer.
        packed_tokens: number of its tokens in packed pages.
        cosine: cosine between exact and packed scores over the tokens that a query sees.
        worst_cosine: mean cosine of the query head with the lowest one.
        top1: share of the queries whose best token stays the same.
        top5: share of the queries whose best token is among the five best over packed keys.
        output_error: |o - o^| / |o| of the attention output, packed values included.
    """

    layer: int
    packed_tokens: int
    cosine: float
    worst_cosine: float
    top1: float
    top5: float
    output_error: float


@dataclass(frozen=True)
class FidelityReport:
    """Fidelity of attention, layer by layer.

    Args:
        tokens: tokens of the context.
        queries: number of queries, the last ones of the context.
        layers: one entry for each layer that was packed.
    """

    tokens: int
    queries: int
    layers: tuple[LayerFidelity, ...]

    def mean(self, name: str) -> float:
        """Mean of one field over the layers.

        Raises:
            InvalidInputError: there is no such figure.
        """
        names = [field.name for field in fields(LayerFidelity)]
        if name not in names:
            known = did_you_mean(name, names) or f"there are {', '.join(names)}"
            raise InvalidInputError(f"there is no figure {name!r}; {known}")
        return float(sum(getattr(layer, name) for layer in self.layers) / len(self.layers))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        means = {name: self.mean(name) for name in ("cosine", "top1", "top5", "output_error")}
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "mean": means}

    def __rich__(self) -> Table:
        table = Table(title=f"Attention over {self.tokens:,} tokens, last {self.queries} queries")
        for name in ("layer", "packed", "cosine", "worst head", "top-1", "top-5", "output error"):
            table.add_column(name, justify="right")
        for one in self.layers:
            figures = (one.cosine, one.worst_cosine)
            parts = (one.top1, one.top5, one.output_error)
            table.add_row(
                str(one.layer),
                f"{one.packed_tokens:,}",
                *(f"{figure:.4f}" for figure in figures),
                *(f"{part:.1%}" for part in parts),
            )
        return table


def _quantizer(given: AnyPress) -> TurboQuant:
    press: Any = as_press(TurboQuant if given is None else given)
    only = press.presses[0] if isinstance(press, Compose) and len(press) == 1 else press
    if not isinstance(only, TurboQuant):
        raise InvalidInputError(f"press is {short_repr(press)}; give a TurboQuant, whose codes are compared")
    return only


@torch.no_grad()
def attention_fidelity(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    press: AnyPress = None,
    queries: int = DEFAULT_QUERIES,
) -> FidelityReport:
    """Compare attention scores over packed keys with exact ones, in every layer that a press packs.

    Args:
        model: decoder-only.
        input_ids: [B, T] int64, unpadded.
        press: how keys and values are packed: a `TurboQuant`, its class, or text; left out, `TurboQuant()`.
        queries: number of queries, the last ones of the context.

    Returns:
        Figures for each packed layer.

    Raises:
        UnsupportedModelError: the model cannot be packed, or its queries cannot be computed.
        InvalidInputError: `input_ids` are no token ids, `queries` is out of range, the press is no TurboQuant
            or detects sinks, or the context is so short that nothing was packed.
    """
    packs = _quantizer(press)
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        given = getattr(input_ids, "shape", type(input_ids).__name__)
        raise InvalidInputError(f"input_ids is {given}; give a tensor of token ids, [batch, tokens]")
    tokens = input_ids.shape[1]
    if not 1 <= queries <= tokens:
        raise InvalidInputError(f"queries is {queries}; the context has {tokens} tokens, give 1 to {tokens}")
    if packs.detect_sinks:
        raise InvalidInputError("detected sinks change the order of tokens; compare with detect_sinks=0")
    exact: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    found: list[LayerFidelity] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = prefill_call(module, args, kwargs)
        if call is not None:
            exact[call.layer_idx] = plain_states(call.cache, call.layer_idx)

    def behind(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call = prefill_call(module, args, kwargs)
        layer = None if call is None else call.cache.layers[call.layer_idx]
        if call is not None and isinstance(layer, PackedLayer):
            found.append(_compared(call, layer, *exact.pop(call.layer_idx), queries))

    with hooked(model, before), packs(model), hooked(model, behind):
        decoder = backbone(model)
        decoder(input_ids=input_ids, **{host.cache_name(decoder): host.empty_cache(model)})
    if not any(layer.packed_tokens for layer in found):
        least = packs.sink_tokens + packs.recent_tokens + PAGE_TOKENS
        raise InvalidInputError(
            f"none of the {tokens} tokens was packed; give a context of at least {least} tokens, or smaller "
            "windows"
        )
    return FidelityReport(tokens, queries, tuple(found))


def _compared(
    call: PrefillCall, layer: PackedLayer, keys: torch.Tensor, values: torch.Tensor, queries: int
) -> LayerFidelity:
    """Compare one layer with its exact keys [B, Hkv, T, D] and values [B, Hkv, T, Dv]."""
    try:
        query = last_queries(call.module, call.hidden_states, call.position_embeddings, queries)
    except UnknownAttentionError as reason:
        name = type(call.module).__name__
        raise UnsupportedModelError(f"the queries of {name} are not known ({reason})") from reason
    batch, heads, tokens, dim = keys.shape
    seen = causal_mask(queries, tokens, None, keys.device)  # [W, T]
    packed_keys, packed_values = (states.clone() for states in (layer.keys, layer.values))  # type: ignore[union-attr]
    scaling = float(getattr(call.module, "scaling", dim**-0.5))
    figures = []
    for head in range(heads):  # one at a time, since queries x tokens is large
        group = query.view(batch, heads, -1, queries, dim)[:, head].float() * scaling  # [B, G, W, D]
        sides = ((keys, values), (packed_keys + 0, packed_values + 0))
        (scores, out), (near, near_out) = (
            _attended(group, k[:, head].float(), v[:, head].float(), seen) for k, v in sides
        )
        figures.append(_figures(scores, near, out, near_out, seen))
    cosine, top1, top5, error = (torch.cat(one, dim=1).double() for one in zip(*figures, strict=True))
    return LayerFidelity(
        layer=call.layer_idx,
        packed_tokens=layer.packed_tokens,
        cosine=float(cosine.mean()),
        worst_cosine=float(cosine.mean(dim=(0, 2)).min()),
        top1=float(top1.mean()),
        top5=float(top5.mean()),
        output_error=float(error.mean()),
    )


@in_named_dtypes
def _attended(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [B, G, W, T] and attention output [B, G, W, Dv]."""
    scores = query @ keys[:, None].mT
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return scores, weights @ values[:, None]


def _figures(
    scores: torch.Tensor, near: torch.Tensor, out: torch.Tensor, near_out: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Cosine, same best token, best token among the five best, error of the output: [B, G, W] each."""
    cosine = torch.cosine_similarity(scores * seen, near * seen, dim=-1)
    best = scores.masked_fill(~seen, -torch.inf).argmax(dim=-1, keepdim=True)
    ranked = near.masked_fill(~seen, -torch.inf).topk(min(TOP, near.shape[-1]), dim=-1).indices
    error = (near_out - out).norm(dim=-1) / out.norm(dim=-1)
    return cosine, (ranked[..., :1] == best)[..., 0], (ranked == best).any(dim=-1), error
