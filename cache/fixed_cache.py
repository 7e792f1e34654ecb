"""A whole cache at fixed addresses: what is done before, in and after each captured decode step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache

from quantpress.cache.compiled_step import layers_of_a_step
from quantpress.cache.fixed import FixedTokens, StepCounters, Window
from quantpress.cache.layer import PackedLayer
from quantpress.errors import InvalidInputError

LEAST_ROOM = 1024  # tokens
GROWTH = 16  # room for a sixteenth more tokens than there are


def unfixable(cache: Cache) -> str | None:
    """Why a cache cannot be used at fixed addresses; None when it can."""
    if getattr(cache, "offloading", False):
        return "the cache is offloaded"
    if getattr(cache, "masked", None):
        return "a head-wise press masks tokens of the cache in place of removing them"
    layers = getattr(cache, "layers", [])
    plain = [index for index, layer in enumerate(layers) if not isinstance(layer, PackedLayer)]
    if plain or not layers:
        names = ", ".join(map(str, plain[:8])) + (", ..." if len(plain) > 8 else "")
        return f"layers {names} of the cache are not packed" if layers else "the cache has no layers"
    if is_mixed(cache):
        return "tokens are packed in two widths"
    empty = [index for index, layer in enumerate(layers) if not layer.packed_tokens]
    if empty:
        return f"layer {empty[0]} of the cache has too few tokens to pack any"
    return None


def is_mixed(cache: Cache) -> bool:
    """Whether a packed layer has pages of two widths."""
    packed = (layer.tokens for layer in cache.layers if isinstance(layer, PackedLayer))
    return any(tokens is not None and tokens.coarse is not None for tokens in packed)


class FixedCache:
    """The layers of a packed cache at fixed addresses.

    Entering again after the layers have changed (a question was undone, beams were reordered) uses the same
    memory for recent tokens; whether all addresses are the same as before is what `addresses` tells.

    Args:
        cache: one that is not `unfixable`.

    Raises:
        InvalidInputError: it is.

    Example:
        >>> # fixed = FixedCache(cache)
        >>> # fixed.enter(new_tokens=100)
        >>> # with fixed.step():                # what can be captured
        >>> #     model(token, past_key_values=cache, attention_mask=fixed_mask)
        >>> # fixed.flush()
    """

    def __init__(self, cache: Cache) -> None:
        reason = unfixable(cache)
        if reason is not None:
            raise InvalidInputError(f"a cache cannot be fixed: {reason}")
        self.cache = cache
        self.layers: list[PackedLayer] = [la for la in cache.layers if isinstance(la, PackedLayer)]
        shape, device = self.layers[0].view().shape[:2], self.layers[0].device
        tokens = [layer.tokens for layer in self.layers]
        with torch.inference_mode(False), torch.no_grad():  # so that any mode may write to it
            self.counters = StepCounters(len(self.layers), shape, device)
            self.windows = [
                Window.like(one, self.counters, index) for index, one in enumerate(tokens) if one is not None
            ]

    def fits(self, cache: Cache) -> bool:
        """Whether this memory can be used for what the cache holds now."""
        same = len(cache.layers) == len(self.layers)
        return same and all(
            layer is own and layer.tokens is not None and window.fits(layer.tokens)
            for layer, own, window in zip(cache.layers, self.layers, self.windows, strict=True)
        )

    @property
    def entered(self) -> bool:
        """Whether every layer is at its fixed addresses."""
        return all(
            layer.fixed is not None and layer.fixed.window is window
            for layer, window in zip(self.layers, self.windows, strict=True)
        )

    def enter(self, new_tokens: int | None = None) -> None:
        """Bring every layer to its fixed addresses.

        Args:
            new_tokens: make room for so many; more come with new addresses. None: a sixteenth more than
                there are, at least `LEAST_ROOM`.
        """
        for layer, window in zip(self.layers, self.windows, strict=True):
            room = max(LEAST_ROOM, layer.get_seq_length() // GROWTH) if new_tokens is None else new_tokens
            layer.reserve(room)
            layer.fix(window)

    def release(self) -> None:
        """Let every layer grow again."""
        for layer in self.layers:
            layer.release()

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

    def replayed(self) -> None:
        """Count on the host what a replayed step has counted on the device."""
        for tokens, layer in zip(self._tokens(), self.layers, strict=True):
            tokens.used += 1
            layer.tokens_seen += 1

    def counts(self) -> list[int]:
        """Recent tokens of each layer, as the host counts them."""
        return [tokens.used for tokens in self._tokens()]

    def recount(self, counts: list[int]) -> None:
        """Go back to `counts`, after a capture that failed half way and has run nothing."""
        for tokens, layer, used in zip(self._tokens(), self.layers, counts, strict=True):
            layer.tokens_seen -= tokens.used - used
            tokens.used = used

    def flush(self) -> bool:
        """After each step: make pages of full windows. Whether there were any."""
        flushed = [tokens.flush() for tokens in self._tokens() if tokens.full]
        return any(flushed)

    def addresses(self) -> list[int]:
        """Where everything lies that a step reads and writes."""
        return [address for tokens in self._tokens() for address in tokens.addresses()]

    def _tokens(self) -> list[FixedTokens]:
        tokens = [layer.fixed for layer in self.layers]
        return [one for one in tokens if one is not None]
