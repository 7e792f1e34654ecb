"""What a model with its cache will weigh, for a context, a batch and a press, and what fits on a GPU.

The bytes of the cache come from `quantpress.cache.memory_estimate` and equal measurements. How many tokens a
press keeps follows from its ratio. Activations are an estimate.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from quantpress.cache.memory import CacheMemory, LayerMemory
from quantpress.cache.memory_estimate import layer_estimate
from quantpress.cache.saved.width_plan import WidthPlan
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.evaluation.sizing.kept_tokens import described, parts, prefill_evictors, tokens_kept
from quantpress.evaluation.sizing.model_outline import LayerOutline, ModelOutline
from quantpress.evaluation.sizing.work_space import Widths
from quantpress.pipelines.reading.chunk_sizes import chunk_length
from quantpress.presses.base_press import BasePress
from quantpress.presses.compose import Compose
from quantpress.presses.traits import traits_of
from quantpress.presses.turboquant import TurboQuant

_MOST_TOKENS = 2**40  # where a search gives up


@dataclass(frozen=True)
class MemoryPlan:
    """A model, its cache and its work space, once a context is read.

    Args:
        press: what compresses the cache, as it is written.
        context: tokens of each sequence.
        batch: number of sequences.
        cache: memory of the cache, layer by layer, all sequences together; states of fixed size, of all
            layers, are an entry of their own.
        exact: whether the number of kept tokens is certain; if not, it is what the press aims at.
        whole_bytes: the cache of all tokens uncompressed, in the model's dtype.
        weights_bytes: bytes of the weights; None where unknown.
        activation_bytes: peak bytes that reading the context needs beside weights and cache, an estimate;
            None where the widths are unknown.
    """

    press: str
    context: int
    batch: int
    cache: CacheMemory
    exact: bool
    whole_bytes: int
    weights_bytes: int | None
    activation_bytes: int | None

    @property
    def ratio(self) -> float:
        """Bytes of the whole cache uncompressed, divided by the bytes of this one."""
        return self.whole_bytes / self.cache.total_bytes if self.cache.total_bytes else 1.0

    @property
    def total_bytes(self) -> int | None:
        """Bytes of weights, cache and activations; None where a part is unknown."""
        if self.weights_bytes is None or self.activation_bytes is None:
            return None
        return self.weights_bytes + self.cache.total_bytes + self.activation_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            **asdict(self),
            "cache": self.cache.as_dict(),
            "ratio": self.ratio,
            "total_bytes": self.total_bytes,
        }


@dataclass(frozen=True)
class Capacity:
    """What fits into a number of bytes.

    Args:
        context: longest context in tokens, at the batch that was asked for; 0 when not even one token fits.
        batch: largest batch, at the context that was asked for; 0 when not even one sequence fits.
    """

    context: int
    batch: int


class Planner:
    """Plans for one model and one press.

    Args:
        model: outline of the model.
        press: what compresses the cache; None keeps all of it.

    Raises:
        UnsupportedModelError: TurboQuant cannot pack the cache of this model.
        UnsupportedHeadDimError: TurboQuant cannot pack keys or values of this head_dim.
        InvalidInputError: how much the press evicts depends on the text.
        CacheFileError: the press has a plan for another model.
    """

    def __init__(self, model: ModelOutline, press: BasePress | None) -> None:
        self.model = model
        self.press = press
        self._evictors = tuple(prefill_evictors(press))
        quantizers = [one for one in parts(press) if isinstance(one, TurboQuant)]
        self._quantizer = quantizers[-1] if quantizers else None
        self._alone = bool(self._evictors) and not isinstance(press, Compose)
        if self._quantizer is not None and model.refusal is not None:
            raise UnsupportedModelError(model.refusal)
        plan = None if self._quantizer is None else self._quantizer.plan
        if isinstance(plan, WidthPlan) and model.layers:
            plan.check(model.layers[0].module.config, without=("rope",))  # known models leave it out
        self._kinds = Counter(self._kind(layer) for layer in model.layers)
        self._order = [self._kind(layer) for layer in model.layers]

    def plan(self, context: int, batch: int = 1) -> MemoryPlan:
        """Plan the memory of a context.

        Args:
            context: tokens T of each sequence.
            batch: number of sequences.

        Raises:
            InvalidInputError: `context` or `batch` is below 1.
        """
        for name, count in (("context", context), ("batch", batch)):
            if count < 1:
                raise InvalidInputError(f"{name} is {count}; give 1 or more")
        kept, exact = tokens_kept(self._evictors, context, self._quantizer is not None)
        # a press of kvpress by itself evicts from sliding-window layers of some models, Compose never does
        exact = exact and not (self._alone and any(kind.sliding for kind in self._kinds))
        estimates = {kind: kind.estimate(context if kind.sliding else kept, batch) for kind in self._kinds}
        whole = {kind: replace(kind, settings=None).estimate(context, batch) for kind in self._kinds}
        kept_states = (self.model.state_bytes or 0) * batch
        states = [LayerMemory(0, 0, 0, 0, 0, 0, 0, 0, kept_states)] if kept_states else []
        return MemoryPlan(
            press=described(self.press),
            context=context,
            batch=batch,
            cache=CacheMemory((*(estimates[kind] for kind in self._order), *states)),
            exact=exact,
            whole_bytes=sum(whole[kind].total_bytes * count for kind, count in self._kinds.items())
            + sum(one.state_bytes for one in states),
            weights_bytes=self.model.weights_bytes,
            activation_bytes=self.activations(context, batch),
        )

    def activations(self, context: int, batch: int) -> int | None:
        """Estimate the peak bytes beside weights and cache while a context is read (`work_space.py`).

        Compared with torch's profiler on the CPU, for bfloat16 models of two shapes and 1500 to 24,000
        tokens, the estimate is 1 % too low to 17 % too high without a press and with TurboQuant, and 6 % too
        low to 30 % too high with Knorm or ExpectedAttention. Other presses may need more for their scores.
        """
        model = self.model
        if model.hidden is None or model.intermediate is None or not model.layers:
            return None
        widths = Widths(
            model.hidden,
            model.intermediate,
            queries=max(layer.query_heads * layer.head_dim for layer in model.layers),
            states=max(layer.kv_heads * layer.head_dim for layer in model.layers),
            rotary=2 * max(layer.head_dim for layer in model.layers),
        )
        tokens, chunk, size = batch * context, batch * chunk_length(context), model.dtype.itemsize
        packed = self._quantizer is not None
        if not chunk:
            return size * widths.whole(tokens, self.press is not None, packed)
        return size * widths.in_chunks(tokens, chunk, bool(self._evictors), packed, size)

    def capacity(self, available: int, context: int, batch: int) -> Capacity:
        """The longest context and the largest batch that fit.

        Args:
            available: bytes for weights, cache and activations.
            context: tokens of each sequence, for the largest batch.
            batch: sequences, for the longest context.

        Raises:
            InvalidInputError: the weights or widths of the model are unknown.
        """
        if self.plan(1).total_bytes is None:
            raise InvalidInputError(
                f"how much fits depends on weights and widths, which {self.model.name!r} leaves open; add "
                "heads, hidden, intermediate and vocab to the shape"
            )
        return Capacity(
            context=_largest(lambda tokens: self._total(tokens, batch) <= available),
            batch=_largest(lambda count: self._total(context, count) <= available),
        )

    def _total(self, context: int, batch: int) -> int:
        return self.plan(context, batch).total_bytes or 0

    def _kind(self, layer: LayerOutline) -> "_Kind":
        settings = None
        if self._quantizer is not None and not layer.sliding:
            sinks = [traits_of(one).sink_tokens for one in self._evictors]
            pinned = max([self._quantizer.sink_tokens, *sinks]) + self._quantizer.detect_sinks
            settings = self._quantizer.layer_settings(layer.module, layer.head_dim, layer.value_dim, pinned)
        shape = (layer.kv_heads, layer.head_dim, layer.value_dim)
        return _Kind(settings, layer.sliding, *shape, self.model.dtype)


@dataclass(frozen=True)
class _Kind:
    """Layers that weigh the same."""

    settings: LayerSettings | None
    sliding: bool
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype

    def estimate(self, tokens: int, batch: int) -> LayerMemory:
        shape = (self.kv_heads, self.head_dim, self.value_dim, batch)
        return layer_estimate(self.settings, tokens, *shape, dtype=self.dtype)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number for which `fits` holds; it holds up to some number and then no more."""
    if not fits(1):
        return 0
    low = 1
    while low < _MOST_TOKENS and fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
