"""One layer of a cache at fixed addresses, as the whole cache sees it: packed, or transformers' own."""

from typing import Any

from transformers.cache_utils import DynamicSlidingWindowLayer

from quantpress.cache.fixed.fixed_plain import FIXED_KINDS, FixedLayer, fix, tokens_of
from quantpress.cache.fixed.fixed_tokens import FixedTokens, Window
from quantpress.cache.fixed.room import Room
from quantpress.cache.fixed.step_counters import StepCounters
from quantpress.cache.layer import PackedLayer
from quantpress.errors import InvalidInputError

LEAST_ROOM = 1024  # tokens
GROWTH = 16  # room for a sixteenth more tokens than there are


def is_plain(layer: object) -> bool:
    """Whether a layer is of a kind that `PlainHold` holds."""
    return type(layer) in FIXED_KINDS or isinstance(layer, FixedLayer)


def room_for(tokens: int, new_tokens: int | None) -> int:
    """How many more than `tokens` to make room for."""
    return max(LEAST_ROOM, tokens // GROWTH) if new_tokens is None else new_tokens


class PackedHold:
    """A `PackedLayer` and the `Window` that its steps write to.

    Args:
        layer: with packed tokens.
        counters: of all layers.
        index: the number of its own.
    """

    def __init__(self, layer: PackedLayer, counters: StepCounters, index: int) -> None:
        if layer.tokens is None:
            raise InvalidInputError(f"layer {index} has no tokens")
        self.layer, self.window = layer, Window.like(layer.tokens, counters, index)

    def fits(self) -> bool:
        """Whether the memory can be used for what the layer holds now."""
        return self.layer.tokens is not None and self.window.fits(self.layer.tokens)

    @property
    def entered(self) -> bool:
        """Whether the layer is there."""
        return self.layer.fixed is not None and self.layer.fixed.window is self.window

    def enter(self, new_tokens: int | None) -> None:
        """Bring the layer there, with room for `new_tokens` more; see `room_for`."""
        self.layer.reserve(room_for(self.layer.get_seq_length(), new_tokens))
        self.layer.fix(self.window)

    def release(self) -> None:
        """Let it grow again."""
        self.layer.release()

    @property
    def counted(self) -> int:
        """Recent tokens, as the host counts them."""
        return self._tokens().used

    def count(self, tokens: int) -> None:
        """So many more of them."""
        self._tokens().used += tokens
        self.layer.tokens_seen += tokens

    @property
    def full(self) -> bool:
        """Whether the layer must be flushed before the next step."""
        return self._tokens().full

    def flush(self) -> bool:
        """Make pages of a full window."""
        return self._tokens().flush()

    def addresses(self) -> list[int]:
        """Where everything lies that a step reads and writes."""
        return self._tokens().addresses()

    def _tokens(self) -> FixedTokens:
        tokens = self.layer.fixed
        if tokens is None:
            raise InvalidInputError("the layer is not at fixed addresses; enter them first")
        return tokens


class PlainHold:
    """A layer of transformers' own and the `Room` that its steps write to.

    Args:
        layer: with tokens; see `is_plain`.
        counters: of all layers.
        index: the number of its own.
        window: tokens that a query sees, where it does not see all; a sliding-window layer knows it itself.
    """

    def __init__(self, layer: Any, counters: StepCounters, index: int, window: int | None) -> None:
        self.layer = layer
        self._counters, self._index = counters, index
        self._ring = isinstance(layer, DynamicSlidingWindowLayer)
        self._window: int | None = layer.sliding_window if self._ring else window
        self._room: Room | None = None
        self._shape = tokens_of(layer).keys.shape[:2]

    def fits(self) -> bool:
        """Whether the counters can be used for what the layer holds now."""
        return is_plain(self.layer) and tokens_of(self.layer).keys.shape[:2] == self._shape

    @property
    def entered(self) -> bool:
        """Whether the layer is there."""
        return self._room is not None and vars(self.layer).get("fixed") is self._room

    def enter(self, new_tokens: int | None) -> None:
        """Bring the layer there, with room for `new_tokens` more; see `room_for`."""
        if self.entered and not self._held().full:
            return
        self._move(new_tokens)

    def _move(self, new_tokens: int | None) -> None:
        if isinstance(self.layer, FixedLayer):
            self.layer.release()
        tokens = tokens_of(self.layer)
        least, places = self._places(tokens.tokens, new_tokens)
        room = self._room
        if room is None or not room.suits(tokens, least):
            room = Room(tokens, places, self._counters, self._index, self._window, self._ring)
        fix(self.layer, room)
        self._room = room

    def _places(self, tokens: int, new_tokens: int | None) -> tuple[int, int]:
        """The fewest places that will do, and how many to make when there are fewer."""
        if self._ring and self._window is not None:
            return self._window, self._window
        least = tokens + 1 + (new_tokens or 0)  # one more, so that the last does not ask for room
        return least, max(least, tokens + room_for(tokens, new_tokens))

    def release(self) -> None:
        """Let it grow again."""
        if self.entered:
            self.layer.release()
        self._room = None

    @property
    def counted(self) -> int:
        """Tokens written, as the host counts them."""
        return self._held().written

    def count(self, tokens: int) -> None:
        """So many more of them."""
        self.layer.count(tokens)

    @property
    def full(self) -> bool:
        """Whether there is no place for the next token."""
        return self._held().full

    def flush(self) -> bool:
        """Make more room."""
        self._move(None)
        return True

    def addresses(self) -> list[int]:
        """Where everything lies that a step reads and writes."""
        return self._held().addresses()

    def _held(self) -> Room:
        if self._room is None:
            raise InvalidInputError("the layer is not at fixed addresses; enter them first")
        return self._room
