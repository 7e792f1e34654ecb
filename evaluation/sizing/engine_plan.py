"""What fits when a serving engine holds the cache: vLLM with the plugin, beside vLLM's own 16-bit cache."""

from dataclasses import dataclass
from typing import Any

from quantpress.cache.engine_memory import (
    EngineLayer,
    engine_widths,
    planned_widths,
    sink_entries,
    why_not_head_dim,
)
from quantpress.cache.saved.width_plan import WidthPlan
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.evaluation.sizing.model_outline import EXAMPLE_SHAPE, ModelOutline
from quantpress.kernels.layout import PAGE_TOKENS

DEFAULT_DTYPES = ("quantpress_4bit", "quantpress_3bit", "quantpress_2bit")
DEFAULT_REQUESTS = 64


@dataclass(frozen=True)
class EnginePlan:
    """The cache of one KV-cache dtype, all layers together.

    Args:
        dtype: as `--kv-cache-dtype` has it, or the model's own; or the file of a plan of widths.
        block_bytes: bytes of a block of 128 tokens.
        pages_bytes: bytes of the blocks of the sequences that were asked about.
        request_bytes: recent tokens of one request in 16 bits.
        recent_bytes: recent tokens of all requests.
        sink_bytes: first tokens of prompts in 16 bits.
        statistics_bytes: statistics of keys and queries.
        tokens: how many tokens fit in blocks; None where the memory or the weights are unknown.
    """

    dtype: str
    block_bytes: int
    pages_bytes: int
    request_bytes: int
    recent_bytes: int
    sink_bytes: int
    statistics_bytes: int
    tokens: int | None

    @property
    def token_bytes(self) -> float:
        """Bytes of a token in a block."""
        return self.block_bytes / PAGE_TOKENS

    @property
    def fixed_bytes(self) -> int:
        """Bytes beside the blocks, which do not grow with the tokens."""
        return self.recent_bytes + self.sink_bytes + self.statistics_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the blocks that were asked about, and of all beside them."""
        return self.pages_bytes + self.fixed_bytes


@dataclass(frozen=True)
class EngineAsked:
    """What is planned for.

    Args:
        context: tokens of each sequence.
        batch: number of sequences.
        requests: most requests at a time, vLLM's max_num_seqs.
        available: bytes for weights and cache; None: not asked.
    """

    context: int
    batch: int
    requests: int = DEFAULT_REQUESTS
    available: int | None = None


def engine_plans(
    model: ModelOutline, dtypes: tuple[str, ...], asked: EngineAsked, widths: WidthPlan | None = None
) -> tuple[EnginePlan, ...]:
    """Plan the cache of vLLM: first in the model's own dtype, then in each of the plugin's.

    Activations and CUDA graphs are not counted.

    Args:
        model: outline of the model.
        dtypes: names such as "quantpress_4bit".
        asked: what is planned for.
        widths: widths of each layer, planned behind the dtypes; None: not asked.

    Raises:
        UnsupportedModelError: the plugin refuses such a model.
        CacheFileError: `widths` are for another model.
        InvalidInputError: a dtype is unknown; `widths` lack a layer, are by head, or have one of 1 or 8
            bits; or memory is given, and the weights are unknown or do not leave any for the cache.
    """
    _check_model(model)
    itemsize = model.dtype.itemsize
    layers = [
        EngineLayer(one.kv_heads, one.head_dim, one.value_dim, itemsize, one.query_heads)
        for one in model.layers
    ]
    if asked.available is not None and model.weights_bytes is None:
        raise InvalidInputError(
            f"how much fits depends on the weights, which {model.name!r} leaves open; add heads, hidden, "
            f"intermediate and vocab to the shape, as in {EXAMPLE_SHAPE}, or give --weights"
        )
    own = sum(one.token_bytes for one in layers) * PAGE_TOKENS
    plans = [_plan(str(model.dtype).removeprefix("torch."), own, (0, 0, 0, 0), model, asked)]
    beside = (
        sum(one.request_bytes for one in layers),
        sum(one.recent_bytes(asked.requests) for one in layers),
        sum(one.sink_bytes(sink_entries(asked.requests)) for one in layers),
        sum(one.statistics_bytes for one in layers),
    )
    planned = {name: [engine_widths(name)] * len(layers) for name in dtypes}
    if widths is not None:
        widths.check(model.layers[0].module.config, without=("rope",))  # known models leave it out
        planned[widths.path or "plan"] = planned_widths(widths, (one.index for one in model.layers))
    for name, pairs in planned.items():
        block = sum(one.block_bytes(*pair) for one, pair in zip(layers, pairs, strict=True))
        plans.append(_plan(name, block, beside, model, asked))
    return tuple(plans)


def _plan(
    dtype: str, block: int, beside: tuple[int, int, int, int], model: ModelOutline, asked: EngineAsked
) -> EnginePlan:
    pages = asked.batch * -(-asked.context // PAGE_TOKENS) * block
    tokens = None
    if asked.available is not None and model.weights_bytes is not None:
        left = asked.available - model.weights_bytes - sum(beside[1:])
        tokens = max(0, left // block) * PAGE_TOKENS
    return EnginePlan(dtype, block, pages, *beside, tokens)


def _check_model(model: ModelOutline) -> None:
    sliding = sum(layer.sliding for layer in model.layers)
    others = model.other_layers + sum(layer.with_state for layer in model.layers)
    dims = {dim for layer in model.layers for dim in (layer.head_dim, layer.value_dim)}
    refused = {dim: reason for dim in sorted(dims) if (reason := why_not_head_dim(dim))}
    latent = any(hasattr(layer.module, "kv_lora_rank") for layer in model.layers)
    reasons = (
        (not model.layers, "it has no attention with a cache of keys and values"),
        (latent, "its cache holds latents (MLA), not keys and values"),
        (sliding, f"{sliding} of its layers are sliding windows"),
        (others, f"{others} of its layers keep something else than keys and values, or share them"),
        (refused, "; ".join(f"its head_dim is {dim}, and {reason}" for dim, reason in refused.items())),
    )
    for found, reason in reasons:
        if found:
            raise UnsupportedModelError(f"the vLLM plugin does not take {model.name}: {reason}")


def as_dict(plan: EnginePlan, own: EnginePlan) -> dict[str, Any]:
    """Plain numbers, for JSON; ratios are to the model's own dtype."""
    return {
        **vars(plan),
        "token_bytes": plan.token_bytes,
        "total_bytes": plan.total_bytes,
        "block_ratio": own.block_bytes / plan.block_bytes,
        "tokens_ratio": plan.tokens / own.tokens if plan.tokens is not None and own.tokens else None,
    }
