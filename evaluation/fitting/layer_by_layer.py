"""How much packing the keys, or the values, of each layer changes a model's predictions: measured.

The text that follows a context is predicted once for each layer, side and width, over a cache with this side
of this layer, or of one of its KV heads, at this width and all else at 8 bits. The error is how much the
divergence of the predictions exceeds that of 8 bits everywhere. So 8 bits have an error of 0, and every other
width is measured.

Tokens of a context attend to one another before they are packed, so what a layer holds does not depend on the
widths of others. A context is therefore read once for each side and width, and head, not for each layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from quantpress.cache import host
from quantpress.cache.saved.width_plan import SIDES, Error, WidthPlan, heads_of
from quantpress.evaluation.divergence.documents import Document
from quantpress.evaluation.divergence.probe import DivergenceProbe
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.rollback import context_rollback, model_rollback
from quantpress.presses.turboquant import TurboQuant

WIDEST = 8
"""Width of all else, whose own errors are far below those of 4 bits."""

Kept = Callable[[str, Callable[[], Any]], Any]
"""The result of this name, which is computed only where there is none yet."""


def layer_by_layer(
    model: PreTrainedModel,
    document: Document,
    press: TurboQuant,
    layers: Sequence[int],
    widths: Sequence[int],
    kept: Kept = lambda name, work: work(),
    step: Callable[[], Any] = lambda: None,
    heads: Mapping[int, int] | None = None,
) -> dict[int, tuple[dict[int, Error], dict[int, Error]]]:
    """Measure the divergence that each layer's keys, and its values, add at each width.

    Args:
        model: decoder-only, in evaluation mode.
        document: a context, which is packed, and a continuation, which is predicted over it.
        press: windows, rotation and all else but the widths.
        layers: indices of the layers that are packed.
        widths: the widths to try, each 1, 2, 3, 4 or 8.
        kept: gives results of an earlier run instead of measuring again.
        step: called `steps_of` times, as the work goes on.
        heads: numbers of KV heads by layer index, to measure each head alone; None: all heads of a layer
            together.

    Returns:
        For each layer, the mean KL in nats a token above that of 8 bits everywhere, when its keys alone have
        a width, and its values; with `heads`, one number for each head. An error below the rounding of the
        model's dtype may come out negative.

    Raises:
        NonFiniteError: the logits hold NaN or infinity.
    """
    context = _Context(model, document, press)
    zeros: dict[int, Error] = {index: 0.0 if heads is None else (0.0,) * heads[index] for index in layers}
    found: dict[int, tuple[dict[int, Error], dict[int, Error]]] = {
        index: ({WIDEST: zero}, {WIDEST: zero}) for index, zero in zeros.items()
    }
    with torch.inference_mode(), model_rollback(model):
        base = kept(f"{WIDEST} bits", context.kl)
        step()
        for bits in sorted({*widths} - {WIDEST}):
            for side, name in enumerate(SIDES):
                for head, members in _parts(layers, heads):
                    other = _Reading(context, side, bits, head, heads or {})
                    for index in members:
                        what = f"layer {index} {name} {bits}" + ("" if head is None else f" head {head}")
                        error = kept(what, lambda at=index, of=other: of.kl(at)) - base  # type: ignore[misc]
                        by_width = found[index][side]
                        by_width[bits] = error if head is None else (*heads_of(by_width.get(bits, ())), error)
                        step()
    return found


def _parts(layers: Sequence[int], heads: Mapping[int, int] | None) -> list[tuple[int | None, Sequence[int]]]:
    """What is at another width at a time: a head, or None for all, and the layers that have it."""
    if heads is None:
        return [(None, layers)]
    return [(head, [index for index in layers if head < heads[index]]) for head in range(max(heads.values()))]


def steps_of(parts: int, widths: Sequence[int]) -> int:
    """How often `layer_by_layer` calls `step` for a document: once for each time it predicts the text.

    Args:
        parts: layers, or heads of all layers.
        widths: the widths to try.
    """
    return 1 + 2 * parts * len({*widths} - {WIDEST})


@dataclass(frozen=True)
class _Context:
    """A context that is read when it is first needed, with 8 bits everywhere."""

    model: PreTrainedModel
    document: Document
    press: TurboQuant

    @cached_property
    def probe(self) -> DivergenceProbe:
        return DivergenceProbe(self.model, [self.document])

    @cached_property
    def cache(self) -> Cache:
        return self.read(replace(self.press, bits=WIDEST))

    def read(self, press: TurboQuant) -> Cache:
        """The context under a press."""
        cache = host.empty_cache(self.model)
        read_context(self.model, self.probe.ids[:, : self.document.context], cache, press, progress=False)
        return cache

    def kl(self, index: int = 0, layer: Any = None) -> float:
        """Mean KL of the continuation; a `layer`, where given, takes the place of the one of this index."""
        with context_rollback(self.cache, self.model):
            if layer is not None:
                self.cache.layers[index] = layer
            return float(np.mean(self.probe.kl_over(self.cache)))


@dataclass(frozen=True)
class _Reading:
    """The same context with one side of every layer at another width, of which one layer at a time is used.

    With a head, only this head has the other width, in layers that have it among their KV heads.
    """

    context: _Context
    side: int
    bits: int
    head: int | None
    heads: Mapping[int, int]

    @cached_property
    def cache(self) -> Cache:
        press, sides = self.context.press, ("key_bits", "value_bits")
        if self.head is None:
            return self.context.read(replace(press, bits=WIDEST, **{sides[self.side]: self.bits}))  # type: ignore[arg-type]
        widths = {}
        for index, count in self.heads.items():
            own = tuple(self.bits if head == self.head else WIDEST for head in range(count))
            widths[index] = (WIDEST, own) if self.side else (own, WIDEST)
        return self.context.read(replace(press, bits=None, plan=WidthPlan("", {}, widths)))

    def kl(self, index: int) -> float:
        return self.context.kl(index, self.cache.layers[index])
