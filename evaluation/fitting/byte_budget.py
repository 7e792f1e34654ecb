"""Widths of all layers, or heads, within a number of true bytes: codes, scales, statistics and windows."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from quantpress.cache.memory_estimate import layer_estimate, page_nbytes
from quantpress.cache.saved.width_plan import Error, Errors, Width, WidthPlan, heads_of
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError
from quantpress.evaluation.fitting.allocation import Choice, allocate, widened
from quantpress.evaluation.sizing.model_outline import LayerOutline
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses.turboquant import TurboQuant

Item = tuple[LayerOutline, int, dict[int, float]]
"""A layer, a side (0: keys, 1: values), and errors by width: of all heads, or of one."""


@dataclass(frozen=True)
class ByteBudget:
    """What the cache of one sequence takes under a press, as far as widths decide.

    Args:
        layers: the layers that are packed.
        press: windows, rotation and all else but the widths.
        context: tokens of the sequence.
        dtype: dtype of the keys and values that the model computes.
    """

    layers: Sequence[LayerOutline]
    press: TurboQuant
    context: int
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Key and value coordinates of all layers."""
        return sum(self.context * one.kv_heads * (one.head_dim + one.value_dim) for one in self.layers)

    def total(self, widths: Mapping[int, tuple[Width, Width]]) -> int:
        """Bytes of the layers under a plan."""
        return sum(self._bytes(layer, *widths[layer.index]) for layer in self.layers)

    def bits(self, widths: Mapping[int, tuple[Width, Width]]) -> float:
        """Bits a value of the layers under a plan, everything included."""
        return 8 * self.total(widths) / self.numbers

    def uniform(self, keys: int, values: int) -> int:
        """Bytes of the layers when all have the same widths."""
        return self.total({layer.index: (keys, values) for layer in self.layers})

    def widths(self, errors: Errors, budget: int) -> dict[int, tuple[Width, Width]]:
        """The widths whose errors add up to the least within a number of bytes.

        What that leaves of the bytes goes to wider codes, the narrowest first: errors below the noise of a
        measurement count as none, and a wider code has less.

        Args:
            errors: by layer index, for keys and for values, the error of each width to choose from; or those
                of each KV head, which then have widths of their own.
            budget: most bytes of all layers.

        Raises:
            InvalidInputError: not even the smallest widths fit.
        """
        items = [
            (layer, side, by_width)
            for layer in self.layers
            for side, every in enumerate(errors[layer.index])
            for by_width in _of_each(every)
        ]
        options = [sorted(by_width) for _, _, by_width in items]
        smallest = self._put_together(items, [min(option) for option in options])
        least = self.total(smallest)
        if budget < least:
            raise InvalidInputError(
                f"{8 * budget / self.numbers:.2f} bits a value are fewer than the smallest widths take at "
                f"{self.context:,} tokens, scales and windows included; give {8 * least / self.numbers:.2f} "
                "or more, a longer context, or smaller widths"
            )
        sizes = Counter((layer.index, side) for layer, side, _ in items)
        choices = [
            [
                Choice(self._page_bytes(layer, side, bits) // sizes[layer.index, side], error)
                for bits, error in sorted(by_width.items())
            ]
            for layer, side, by_width in items
        ]
        fixed = least - sum(min(choice.cost for choice in item) for item in choices)
        chosen = allocate(choices, budget - fixed)
        chosen = widened(choices, chosen, budget - fixed)
        return self._put_together(items, [some[at] for some, at in zip(options, chosen, strict=True)])

    def _put_together(self, items: Sequence[Item], bits: Sequence[int]) -> dict[int, tuple[Width, Width]]:
        """The widths of layers from those of items, in their order."""
        heads: dict[tuple[int, int], list[int]] = {}
        for (layer, side, _), one in zip(items, bits, strict=True):
            heads.setdefault((layer.index, side), []).append(one)
        sides = {at: own[0] if len({*own}) == 1 else tuple(own) for at, own in heads.items()}
        return {layer.index: (sides[layer.index, 0], sides[layer.index, 1]) for layer in self.layers}

    def _page_bytes(self, layer: LayerOutline, side: int, bits: int) -> int:
        """Bytes of the pages of keys (side 0) or values (1) of a layer."""
        settings = self._settings(layer, bits, bits)
        pages = max(0, (self.context - settings.sink_tokens - settings.recent_tokens) // PAGE_TOKENS)
        return pages * page_nbytes(
            (settings.key_codec, settings.value_codec)[side], self.dtype, layer.kv_heads
        )

    def _bytes(self, layer: LayerOutline, keys: Width, values: Width) -> int:
        shape = (self.context, layer.kv_heads, layer.head_dim, layer.value_dim)
        return layer_estimate(self._settings(layer, keys, values), *shape, dtype=self.dtype).total_bytes

    def _settings(self, layer: LayerOutline, keys: Width, values: Width) -> LayerSettings:
        plan = WidthPlan("", {}, {layer.index: (keys, values)})
        press = replace(self.press, bits=None, plan=plan)
        sinks = press.sink_tokens + press.detect_sinks
        settings = press.layer_settings(layer.module, layer.head_dim, layer.value_dim, sinks)
        if settings is None:
            raise InvalidInputError(f"layer {layer.index} is not packed; leave layer_bits out of the press")
        return settings


def _of_each(errors: Mapping[int, Error]) -> list[dict[int, float]]:
    """The errors by width of a layer as a whole, or of each of its heads."""
    by_width = {bits: heads_of(error) for bits, error in errors.items()}
    return [dict(zip(by_width, one, strict=True)) for one in zip(*by_width.values(), strict=True)]
