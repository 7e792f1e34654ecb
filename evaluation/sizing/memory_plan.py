"""What a model with its cache will weigh, for a context, a batch and a press, and what a GPU has room for.

Bytes of the cache are those that `quantpress.cache.memory_estimate` gives, which equal measurements. How
many tokens a press keeps follows from its ratio; activations are an estimate, and say so.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from kvpress import BasePress, StreamingLLMPress

from quantpress.cache.memory import CacheMemory, LayerMemory
from quantpress.cache.memory_estimate import layer_estimate
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.evaluation.sizing.kept_tokens import described, parts, prefill_evictors, tokens_kept
from quantpress.evaluation.sizing.model_outline import LayerOutline, ModelOutline
from quantpress.evaluation.sizing.work_space import Widths
from quantpress.pipelines.reading.read_context import chunk_length
from quantpress.presses.compose import Compose
from quantpress.presses.turboquant import TurboQuant

_MOST_TOKENS = 2**40  # where a search gives up


@dataclass(frozen=True)
class MemoryPlan:
    """A model, its cache and its work space, once a context is read.

    Args:
        press: what compresses the cache, in words.
        context: tokens of each sequence.
        batch: sequences.
        cache: layer by layer, all sequences.
        exact: whether the number of tokens kept is sure; else it is what the press aims at.
        whole_bytes: the cache of all tokens uncompressed, in the model's dtype.
        weights_bytes: of the model; None where unknown.
        activation_bytes: most of what reading the context needs beside weights and cache; an estimate, None
            where the widths are unknown.
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
        """The whole cache uncompressed over this one."""
        return self.whole_bytes / self.cache.total_bytes if self.cache.total_bytes else 1.0

    @property
    def total_bytes(self) -> int | None:
        """Weights, cache and activations; None where a part is unknown."""
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
class Room:
    """What fits into a number of bytes.

    Args:
        context: the longest one, in tokens, with the batch that was asked for; 0 when not even one token.
        batch: the largest one with the context that was asked for; 0 when not even one sequence.
    """

    context: int
    batch: int


class Planner:
    """Plans for one model and one press.

    Args:
        model: its outline.
        press: None keeps the whole cache.

    Raises:
        UnsupportedModelError: TurboQuant cannot pack this model's cache.
        UnsupportedHeadDimError: nor its head_dim.
        InvalidInputError: how much the press evicts depends on the text.
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
        self._kinds = Counter(self._kind(layer) for layer in model.layers)
        self._order = [self._kind(layer) for layer in model.layers]

    def plan(self, context: int, batch: int = 1) -> MemoryPlan:
        """The bytes of a context.

        Args:
            context: tokens T of each sequence.
            batch: sequences.

        Raises:
            InvalidInputError: a count is below 1.
        """
        for name, count in (("context", context), ("batch", batch)):
            if count < 1:
                raise InvalidInputError(f"{name} is {count}; give 1 or more")
        kept, exact = tokens_kept(self._evictors, context, self._quantizer is not None)
        # a press of kvpress alone evicts from sliding-window layers in some models, Compose in none
        exact = exact and not (self._alone and any(kind.sliding for kind in self._kinds))
        estimates = {kind: kind.estimate(context if kind.sliding else kept, batch) for kind in self._kinds}
        whole = {kind: replace(kind, settings=None).estimate(context, batch) for kind in self._kinds}
        return MemoryPlan(
            press=described(self.press),
            context=context,
            batch=batch,
            cache=CacheMemory(tuple(estimates[kind] for kind in self._order)),
            exact=exact,
            whole_bytes=sum(whole[kind].total_bytes * count for kind, count in self._kinds.items()),
            weights_bytes=self.model.weights_bytes,
            activation_bytes=self.activations(context, batch),
        )

    def activations(self, context: int, batch: int) -> int | None:
        """Most bytes in use beside weights and cache while a context is read, about.

        See `work_space.py`. Against torch's profiler on the CPU, for bfloat16 models of two
        shapes and 1500 to 24,000 tokens, it is between 1 % too low and 17 % too high without a press and with
        TurboQuant; with Knorm or ExpectedAttention between 6 % too low and 30 % too high. Other presses may
        need more for their scores.
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

    def room(self, capacity: int, context: int, batch: int) -> Room:
        """The longest context and the largest batch that fit.

        Args:
            capacity: bytes for weights, cache and activations.
            context: that the batch is to have.
            batch: that the context is to have.

        Raises:
            InvalidInputError: the model's weights or widths are unknown.
        """
        if self.plan(1).total_bytes is None:
            raise InvalidInputError(
                f"how much fits depends on weights and widths, which {self.model.name!r} leaves open; add "
                "heads, hidden, intermediate and vocab to the shape"
            )
        return Room(
            context=_largest(lambda tokens: self._total(tokens, batch) <= capacity),
            batch=_largest(lambda count: self._total(context, count) <= capacity),
        )

    def _total(self, context: int, batch: int) -> int:
        return self.plan(context, batch).total_bytes or 0

    def _kind(self, layer: LayerOutline) -> "_Kind":
        settings = None
        if self._quantizer is not None and not layer.sliding:
            sinks = [one.n_sink for one in self._evictors if isinstance(one, StreamingLLMPress)]
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
