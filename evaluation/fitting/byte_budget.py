"""Widths of all layers, or heads, within a number of true bytes: codes, scales, statistics and windows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from quantpress.cache.memory_estimate import layer_estimate, page_nbytes
from quantpress.cache.saved.width_plan import Error, Errors, Width, WidthPlan, heads_of
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError
from quantpress.evaluation.fitting.allocation import Choice, allocate, widened
from quantpress.evaluation.fitting.head_choices import Pair, head_choices, pair_errors
from quantpress.evaluation.sizing.model_outline import LayerOutline
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses.turboquant import TurboQuant

Option = tuple[Choice, dict[tuple[int, int], Width]]
"""A choice, and the widths that it means, by index of the layer and side (0: keys, 1: values)."""


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
                of each KV head, which then have widths of their own, in at most two groups in a layer.
            budget: most bytes of all layers.

        Raises:
            InvalidInputError: not even the smallest widths fit.
        """
        items = [item for layer in self.layers for item in self._items(layer, *errors[layer.index])]
        least = self.total(_widths(item[0] for item in items))
        if budget < least:
            raise InvalidInputError(
                f"{8 * budget / self.numbers:.2f} bits a value are fewer than the smallest widths take at "
                f"{self.context:,} tokens, scales and windows included; give {8 * least / self.numbers:.2f} "
                "or more, a longer context, or smaller widths"
            )
        choices = [[choice for choice, _ in item] for item in items]
        left = budget - least + sum(item[0].cost for item in choices)
        chosen = widened(choices, allocate(choices, left), left)
        return _widths(item[at] for item, at in zip(items, chosen, strict=True))

    def _items(self, layer: LayerOutline, *errors: Mapping[int, Error]) -> list[list[Option]]:
        """What can be chosen for a layer: widths of each side, or those of all heads together."""
        costs = [
            {bits: self._page_bytes(layer, side, bits) for bits in sorted(by_width)}
            for side, by_width in enumerate(errors)
        ]
        keys, values = ({bits: heads_of(one) for bits, one in by_width.items()} for by_width in errors)
        if not any(isinstance(error, tuple) for by_width in errors for error in by_width.values()):
            return [
                [(Choice(cost, by_width[bits][0]), {(layer.index, side): bits}) for bits, cost in own.items()]
                for side, (by_width, own) in enumerate(zip((keys, values), costs, strict=True))
            ]
        of_head = {
            (k, v): (costs[0][k] + costs[1][v]) // layer.kv_heads for k, v in product(costs[0], costs[1])
        }
        every = head_choices(pair_errors(keys, values), of_head)
        return [[(one, _sides(layer.index, pairs)) for one, pairs in every]]

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


def _sides(index: int, pairs: Sequence[Pair]) -> dict[tuple[int, int], Width]:
    """The widths of both sides of a layer from the pair of each head; one number where heads are alike."""
    sides = zip(*pairs, strict=True)
    return {(index, side): own[0] if len({*own}) == 1 else own for side, own in enumerate(sides)}


def _widths(options: Iterable[Option]) -> dict[int, tuple[Width, Width]]:
    """The widths of layers from what was chosen."""
    sides = {at: bits for _, part in options for at, bits in part.items()}
    return {index: (sides[index, 0], sides[index, 1]) for index, _ in sides}
