"""How much packing the keys, or the values, of each layer changes a model's predictions: measured.

A context is read once for each layer, side and width, with this side of this layer at this width and all else
at 8 bits. The error is how much the divergence of the predictions exceeds that of 8 bits everywhere. So 8
bits have an error of 0, and every other width is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from quantpress.cache.saved.width_plan import SIDES
from quantpress.evaluation.divergence.documents import Document
from quantpress.evaluation.divergence.probe import DivergenceProbe
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
        kept: gives results of an earlier run instead of reading again.
        step: called `steps_of` times, as the work goes on.

    Returns:
        For each layer, the mean KL in nats a token above that of 8 bits everywhere, when its keys alone have
        a width, and its values. An error below the rounding of the model's dtype may come out negative.

    Raises:
        NonFiniteError: the logits hold NaN or infinity.
    """
    probe = cache(lambda: DivergenceProbe(model, [document]))

    def kl(name: str, pairs: dict[int, tuple[int, int]] | None) -> float:
        made = replace(press, bits=WIDEST, layer_bits=pairs)
        value = kept(name, lambda: float(np.mean(probe().over(made)[0].kl)))
        step()
        return float(value)

    base = kl(f"{WIDEST} bits", None)
    found: dict[int, tuple[dict[int, float], dict[int, float]]] = {}
    for index in layers:
        found[index] = ({WIDEST: 0.0}, {WIDEST: 0.0})
        for side, name in enumerate(SIDES):
            for bits in sorted({*widths} - {WIDEST}):
                pair = (WIDEST, bits) if side else (bits, WIDEST)
                found[index][side][bits] = kl(f"layer {index} {name} {bits}", {index: pair}) - base
    return found


def steps_of(layers: int, widths: Sequence[int]) -> int:
    """How often `layer_by_layer` calls `step` for a document: the number of its readings."""
    return 1 + 2 * layers * len({*widths} - {WIDEST})
