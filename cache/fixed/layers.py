"""The layers of a `FixedCache`: each holds the memory that the steps of one layer write to."""

from typing import Any

from transformers.cache_utils import DynamicSlidingWindowLayer

from quantpress.cache.fixed.buffer import TokenBuffer
from quantpress.cache.fixed.plain import BufferedLayer, fix, is_plain, tokens_of
from quantpress.cache.fixed.step_counters import StepCounters
from quantpress.cache.layer import PackedLayer
from quantpress.cache.tokens.fixed_tokens import FixedTokens, Window
from quantpress.errors import InvalidInputError

LEAST_SPARE = 1024  # tokens
GROWTH = 16  # spare capacity for a sixteenth of the tokens there are


def spare_tokens(tokens: int, new_tokens: int | None) -> int:
    """How many tokens beyond `tokens` to make capacity for."""
    return max(LEAST_SPARE, tokens // GROWTH) if new_tokens is None else new_tokens


class FixedPackedLayer:
    """A `PackedLayer` and the `Window` that its steps write to.

    Args:
        layer: with packed tokens.
        counters: of all layers.
        index: of this layer.
    """

    def __init__(self, layer: PackedLayer, counters: StepCounters, index: int) -> None:
        tokens = layer.tokens
        if tokens is None:
            raise InvalidInputError(f"layer {index} has no tokens")
        heads = tokens.sinks.kv_heads
        newest, recent, _ = counters.bound(index, heads)
        self.layer = layer
        self.shown = counters.shown(index, heads, tokens.sinks.tokens)
        self.window = Window(tokens, newest, counters.packed[index, :, :heads], recent, self.shown)

    def fits(self) -> bool:
        """Whether the memory can be used for the tokens that the layer holds now."""
        tokens = self.layer.tokens
        return tokens is not None and self.window.fits(tokens)

    @property
    def entered(self) -> bool:
        """Whether the layer is at its fixed addresses."""
        return self.layer.fixed is not None and self.layer.fixed.window is self.window

    def enter(self, new_tokens: int | None) -> None:
        """Bring the layer to its fixed addresses, with capacity for `new_tokens` more; see `spare_tokens`."""
        self.layer.reserve(spare_tokens(self.layer.get_seq_length(), new_tokens))
        self.layer.fix(self.window)

    def release(self) -> None:
        """Let the layer grow again."""
        self.layer.release()

    @property
    def counted(self) -> int:
        """Recent tokens, as the host counts them."""
        return self._tokens().used

    def count(self, tokens: int) -> None:
        """Count, on the host, tokens that steps have written."""
        self._tokens().used += tokens
        self.layer.tokens_seen += tokens

    @property
    def full(self) -> bool:
        """Whether the layer must be flushed before the next step."""
        return self._tokens().full

    def flush(self) -> bool:
        """Make a page of the oldest tokens of a full window."""
        return self._tokens().flush()

    def addresses(self) -> list[int]:
        """The addresses of everything that a step reads and writes."""
        return self._tokens().addresses()

    def _tokens(self) -> FixedTokens:
        tokens = self.layer.fixed
        if tokens is None:
            raise InvalidInputError("the layer is not at fixed addresses; enter them first")
        return tokens


class FixedPlainLayer:
    """A layer of transformers' own and the `TokenBuffer` that its steps write to.

    Args:
        layer: with tokens; see `is_plain`.
        counters: of all layers.
        index: of this layer.
        window: how many tokens a query sees, where it does not see all; a sliding-window layer knows its own.
    """

    def __init__(self, layer: Any, counters: StepCounters, index: int, window: int | None) -> None:
        self.layer = layer
        self._counters, self._index = counters, index
        self._ring = isinstance(layer, DynamicSlidingWindowLayer)
        self._window: int | None = layer.sliding_window if self._ring else window
        self._buffer: TokenBuffer | None = None
        self._shape = tokens_of(layer).keys.shape[:2]

    def fits(self) -> bool:
        """Whether the counters can be used for the tokens that the layer holds now."""
        keys: Any = tokens_of(self.layer).keys if is_plain(self.layer) else None
        return keys is not None and bool(keys.shape[:2] == self._shape)

    @property
    def entered(self) -> bool:
        """Whether the layer is at its fixed addresses."""
        return isinstance(self.layer, BufferedLayer) and self.layer.fixed is self._buffer

    def enter(self, new_tokens: int | None) -> None:
        """Bring the layer to its fixed addresses, with capacity for `new_tokens` more; see `spare_tokens`."""
        if not self.entered or self._held().full:
            self._move(new_tokens)

    def _move(self, new_tokens: int | None) -> None:
        if isinstance(self.layer, BufferedLayer):
            self.layer.release()
        tokens = tokens_of(self.layer)
        least, capacity = self._capacity(tokens.tokens, new_tokens)
        buffer = self._buffer
        if buffer is None or not buffer.suits(tokens, least):
            buffer = TokenBuffer(tokens, capacity, self._counters, self._index, self._window, self._ring)
        fix(self.layer, buffer)
        self._buffer = buffer

    def _capacity(self, tokens: int, new_tokens: int | None) -> tuple[int, int]:
        """The least capacity that will do, and the capacity of a new buffer where there is less."""
        if self._ring and self._window is not None:
            return self._window, self._window
        least = tokens + 1 + (new_tokens or 0)  # one more, so that the last token does not ask for capacity
        return least, max(least, tokens + spare_tokens(tokens, new_tokens))

    def release(self) -> None:
        """Let the layer grow again."""
        if self.entered:
            self.layer.release()
        self._buffer = None

    @property
    def counted(self) -> int:
        """Tokens written, as the host counts them."""
        return self._held().written

    def count(self, tokens: int) -> None:
        """Count, on the host, tokens that steps have written."""
        self.layer.count(tokens)

    @property
    def full(self) -> bool:
        """Whether there is no slot for the next token."""
        return self._held().full

    def flush(self) -> bool:
        """Move to a larger buffer."""
        self._move(None)
        return True

    def addresses(self) -> list[int]:
        """The addresses of everything that a step reads and writes."""
        return self._held().addresses()

    def _held(self) -> TokenBuffer:
        if self._buffer is None:
            raise InvalidInputError("the layer is not at fixed addresses; enter them first")
        return self._buffer
