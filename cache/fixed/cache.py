"""`FixedCache`: a whole cache at fixed addresses, before, in and after each captured decode step."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from quantpress.cache.attention.step import layers_of_a_step
from quantpress.cache.fixed.fixable import unfixable
from quantpress.cache.fixed.layers import FixedPackedLayer, FixedPlainLayer
from quantpress.cache.fixed.plain import tokens_of
from quantpress.cache.fixed.step_counters import StepCounters
from quantpress.cache.layer import PackedLayer
from quantpress.errors import InvalidInputError


class FixedCache:
    """The layers of a cache at fixed addresses: packed ones, and transformers' own.

    Entering again after the layers have changed (a question was undone, beams were reordered) uses the same
    memory where it can. `addresses` tells whether all addresses are the same as before.

    Args:
        cache: one that `unfixable` gives no reason against.
        windows: how far back attention looks, by layer index, for layers that look over a window only. A
            sliding-window layer of transformers knows its own.

    Raises:
        InvalidInputError: the cache cannot be used at fixed addresses; the message says why.

    Example:
        >>> # fixed = FixedCache(cache)
        >>> # fixed.enter(new_tokens=100)
        >>> # with fixed.step():                # what can be captured
        >>> #     model(token, past_key_values=cache, attention_mask=fixed_mask)
        >>> # fixed.flush()
    """

    def __init__(self, cache: Cache, windows: Mapping[int, int] | None = None) -> None:
        if reasons := unfixable(cache):
            raise InvalidInputError(f"a cache cannot be fixed: {', and '.join(reasons)}")
        self.cache = cache
        self.layers: list[Any] = list(cache.layers)
        shapes = [_shape(layer) for layer in self.layers]
        with torch.inference_mode(False), torch.no_grad():  # so that any mode may write to it
            heads = max(heads for _, heads in shapes)
            self.counters = StepCounters(len(shapes), (shapes[0][0], heads), self.layers[0].device)
            self.fixed_layers = [
                FixedPackedLayer(layer, self.counters, index)
                if isinstance(layer, PackedLayer)
                else FixedPlainLayer(layer, self.counters, index, (windows or {}).get(index))
                for index, layer in enumerate(self.layers)
            ]

    def fits(self, cache: Cache) -> bool:
        """Whether this memory can be used for what the cache holds now."""
        same = len(cache.layers) == len(self.layers)
        return same and all(
            layer is one.layer and one.fits()
            for layer, one in zip(cache.layers, self.fixed_layers, strict=True)
        )

    @property
    def entered(self) -> bool:
        """Whether every layer is at its fixed addresses."""
        return all(one.entered for one in self.fixed_layers)

    def enter(self, new_tokens: int | None = None) -> None:
        """Bring every layer to its fixed addresses.

        Args:
            new_tokens: make capacity for so many; more than these come with new addresses. None: for a
                sixteenth of the tokens there are, and at least `LEAST_SPARE`.
        """
        for one in self.fixed_layers:
            one.enter(new_tokens)

    def release(self) -> None:
        """Let every layer grow again."""
        for one in self.fixed_layers:
            one.release()

    @contextmanager
    def step(self) -> Iterator[None]:
        """One forward pass over one new token, eager or captured. The device counts inside."""
        self.counters.advance()
        for layer in self.layers:
            layer.stepping = True
        try:
            with layers_of_a_step(self.layers):
                yield
        finally:
            for layer in self.layers:
                layer.stepping = False

    def pad(self, padding: torch.Tensor | None) -> bool:
        """Hide so many tokens in front of each sequence from the next steps.

        Args:
            padding: [B or 1] integers, for a cache whose layers are all packed and hold all tokens; None: no
                padding.

        Returns:
            Whether steps read other tensors than before: those that were captured do not fit.
        """
        padded, before = padding is not None, self.counters.padded
        if padding is not None:
            self.counters.padding.copy_(padding)
        self.counters.padded = padded
        for one in self.fixed_layers:
            if isinstance(one, FixedPackedLayer):
                one.shown.active = padded
        return padded != before

    def replayed(self) -> None:
        """Count, on the host, what a replayed step counts on the device."""
        for one in self.fixed_layers:
            one.count(1)

    def counts(self) -> list[int]:
        """Tokens of each layer, as the host counts them."""
        return [one.counted for one in self.fixed_layers]

    def recount(self, counts: list[int]) -> None:
        """Go back to `counts`, after a capture that failed half way and ran nothing."""
        for one, counted in zip(self.fixed_layers, counts, strict=True):
            one.count(counted - one.counted)

    def flush(self) -> bool:
        """After each step: make pages of full windows, and capacity where there is none.

        Returns:
            Whether there was anything to do.
        """
        flushed = [one.flush() for one in self.fixed_layers if one.full]
        return any(flushed)

    def addresses(self) -> list[int]:
        """The addresses of everything that a step reads and writes."""
        return [address for one in self.fixed_layers for address in one.addresses()]


def _shape(layer: Any) -> tuple[int, int]:
    """(B, Hkv) of a layer with tokens."""
    keys = (layer.view().sinks if isinstance(layer, PackedLayer) else tokens_of(layer)).keys
    return keys.shape[0], keys.shape[1]
