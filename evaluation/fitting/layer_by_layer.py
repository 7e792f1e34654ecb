"""How much packing the keys, or the values, of each layer changes a model's predictions: measured.

The text that follows a context is predicted once for each layer, side and width, over a cache with this side
of this layer at this width and all else at 8 bits. The error is how much the divergence of the predictions
exceeds that of 8 bits everywhere. So 8 bits have an error of 0, and every other width is measured.

Tokens of a context attend to one another before they are packed, so what a layer holds does not depend on the
widths of others. A context is therefore read once for each side and width, not for each layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from quantpress.cache import host
from quantpress.cache.saved.width_plan import SIDES
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
) -> dict[int, tuple[dict[int, float], dict[int, float]]]:
    """Measure the divergence that each layer's keys, and its values, add at each width.

    Args:
        model: decoder-only, in evaluation mode.
        document: a context, which is packed, and a continuation, which is predicted over it.
        press: windows, rotation and all else but the widths.
        layers: indices of the layers that are packed.
        widths: the widths to try, each 1, 2, 3, 4 or 8.
        kept: gives results of an earlier run instead of measuring again.
        step: called `steps_of` times, as the work goes on.

    Returns:
        For each layer, the mean KL in nats a token above that of 8 bits everywhere, when its keys alone have
        a width, and its values. An error below the rounding of the model's dtype may come out negative.

    Raises:
        NonFiniteError: the logits hold NaN or infinity.
    """
    context = _Context(model, document, press)
    found: dict[int, tuple[dict[int, float], dict[int, float]]] = {
        index: ({WIDEST: 0.0}, {WIDEST: 0.0}) for index in layers
    }
    with torch.inference_mode(), model_rollback(model):
        base = kept(f"{WIDEST} bits", context.kl)
        step()
        for bits in sorted({*widths} - {WIDEST}):
            for side, name in enumerate(SIDES):
                other = _Reading(context, *((WIDEST, bits) if side else (bits, WIDEST)))
                for index in layers:
                    value = kept(f"layer {index} {name} {bits}", lambda at=index, of=other: of.kl(at))  # type: ignore[misc]
                    found[index][side][bits] = value - base
                    step()
    return found


def steps_of(layers: int, widths: Sequence[int]) -> int:
    """How often `layer_by_layer` calls `step` for a document: once for each time it predicts the text."""
    return 1 + 2 * layers * len({*widths} - {WIDEST})


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
        return self.read(WIDEST, WIDEST)

    def read(self, keys: int, values: int) -> Cache:
        """The context with the same widths in every layer."""
        cache = host.empty_cache(self.model)
        press = replace(self.press, bits=None, key_bits=keys, value_bits=values)
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
    """The same context with other widths, of which one layer at a time is used."""

    context: _Context
    keys: int
    values: int

    @cached_property
    def cache(self) -> Cache:
        return self.context.read(self.keys, self.values)

    def kl(self, index: int) -> float:
        return self.context.kl(index, self.cache.layers[index])
