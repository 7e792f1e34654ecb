"""Widths of all layers within a number of true bytes: codes, scales, statistics and windows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from quantpress.cache.memory_estimate import layer_estimate, page_nbytes
from quantpress.cache.saved.width_plan import Errors
from quantpress.cache.settings import LayerSettings
from quantpress.errors import InvalidInputError
from quantpress.evaluation.fitting.allocation import Choice, allocate, widened
from quantpress.evaluation.sizing.model_outline import LayerOutline
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses.turboquant import TurboQuant


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

    def total(self, widths: dict[int, tuple[int, int]]) -> int:
        """Bytes of the layers under a plan."""
        return sum(self._bytes(layer, *widths[layer.index]) for layer in self.layers)

    def bits(self, widths: dict[int, tuple[int, int]]) -> float:
        """Bits a value of the layers under a plan, everything included."""
        return 8 * self.total(widths) / self.numbers

    def uniform(self, keys: int, values: int) -> int:
        """Bytes of the layers when all have the same widths."""
        return self.total({layer.index: (keys, values) for layer in self.layers})

    def widths(self, errors: Errors, budget: int) -> dict[int, tuple[int, int]]:
        """The widths whose errors add up to the least within a number of bytes.

        What that leaves of the bytes goes to wider codes, the narrowest first: errors below the noise of a
        measurement count as none, and a wider code has less.

        Args:
            errors: by layer index, for keys and for values, the error of each width to choose from.
            budget: most bytes of all layers.

        Raises:
            InvalidInputError: not even the smallest widths fit.
        """
        choices = [
            [Choice(self._page_bytes(layer, side, bits), error) for bits, error in sorted(by_width.items())]
            for layer in self.layers
            for side, by_width in enumerate(errors[layer.index])
        ]
        options = [sorted(by_width) for layer in self.layers for by_width in errors[layer.index]]
        least_bits = [min(option) for option in options]
        smallest = {
            layer.index: (least_bits[2 * i], least_bits[2 * i + 1]) for i, layer in enumerate(self.layers)
        }
        least = self.total(smallest)
        if budget < least:
            raise InvalidInputError(
                f"{8 * budget / self.numbers:.2f} bits a value are fewer than the smallest widths take at "
                f"{self.context:,} tokens, scales and windows included; give {8 * least / self.numbers:.2f} "
                "or more, a longer context, or smaller widths"
            )
        fixed = least - sum(min(choice.cost for choice in item) for item in choices)
        chosen = allocate(choices, budget - fixed)
        chosen = widened(choices, chosen, budget - fixed)
        bits = [widths[index] for widths, index in zip(options, chosen, strict=True)]
        return {layer.index: (bits[2 * i], bits[2 * i + 1]) for i, layer in enumerate(self.layers)}

    def _page_bytes(self, layer: LayerOutline, side: int, bits: int) -> int:
        """Bytes of the pages of keys (side 0) or values (1) of a layer."""
        settings = self._settings(layer, bits, bits)
        kept = self.context - settings.sink_tokens - settings.recent_tokens
        pages = layer.kv_heads * max(0, kept // PAGE_TOKENS)
        return pages * page_nbytes((settings.key_codec, settings.value_codec)[side], self.dtype)

    def _bytes(self, layer: LayerOutline, keys: int, values: int) -> int:
        shape = (self.context, layer.kv_heads, layer.head_dim, layer.value_dim)
        return layer_estimate(self._settings(layer, keys, values), *shape, dtype=self.dtype).total_bytes

    def _settings(self, layer: LayerOutline, keys: int, values: int) -> LayerSettings:
        press = replace(self.press, bits=None, key_bits=keys, value_bits=values)
        sinks = press.sink_tokens + press.detect_sinks
        settings = press.layer_settings(layer.module, layer.head_dim, layer.value_dim, sinks)
        if settings is None:
            raise InvalidInputError(f"layer {layer.index} is not packed; leave layer_bits out of the press")
        return settings
