"""`Room`: memory of a fixed size for the tokens of a layer that nothing packs; steps write to it."""

import torch

from quantpress.cache.fixed.step_counters import StepCounters
from quantpress.cache.tokens.segments import after, first
from quantpress.cache.tokens.view import PackedView
from quantpress.codecs.raw import RawPages
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide
from quantpress.quantization.transform import ChannelTransform


class Room:
    """Memory for the tokens of one plain layer.

    Args:
        like: keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] that it is for.
        places: C, for so many tokens.
        counters: of all layers.
        layer: the number of its own.
        window: how many tokens a query sees, itself included; None: all.
        ring: a token beyond the last place is written to the first; C is the window.

    Attributes:
        keys, values: [B, Hkv, C, D], [B, Hkv, C, Dv].
        written: tokens written so far, those that others have taken the place of included.
        taken: whether its memory belongs to someone else now.
    """

    def __init__(
        self,
        like: DenseSegment,
        places: int,
        counters: StepCounters,
        layer: int,
        window: int | None,
        ring: bool,
    ) -> None:
        self.place, self._used, self._starts = counters.bound(layer, like.kv_heads, window, ring)
        self.window, self.ring, self.written, self.taken = window, ring, 0, False
        with torch.inference_mode(False), torch.no_grad():  # so that any mode may write to it
            self.keys, self.values = (
                states.new_zeros((*states.shape[:2], places, states.shape[-1]))
                for states in (like.keys, like.values)
            )

    @property
    def places(self) -> int:
        """Tokens that there is room for."""
        return self.keys.shape[2]

    @property
    def full(self) -> bool:
        """Whether there is no place for the next token."""
        return not self.ring and self.written == self.places

    @property
    def held(self) -> DenseSegment:
        """What is in use, as views, in the order of places."""
        return first(DenseSegment(self.keys, self.values), min(self.written, self.places))

    def suits(self, tokens: DenseSegment, places: int) -> bool:
        """Whether it is free and can take tokens of this kind, `places` in all."""
        return (
            not self.taken
            and self.places >= places
            and all(
                (*own.shape[:2], own.shape[3]) == (*other.shape[:2], other.shape[3])
                and (own.dtype, own.device) == (other.dtype, other.device)
                for own, other in ((self.keys, tokens.keys), (self.values, tokens.values))
            )
        )

    def fill(self, tokens: DenseSegment) -> None:
        """Take tokens over, in the order of the text, and tell the device; a ring those it can still show."""
        if self.ring:
            tokens = after(tokens, max(0, tokens.tokens - self.places + 1))
        count = tokens.tokens
        self.keys[:, :, :count] = tokens.keys
        self.values[:, :, :count] = tokens.values
        self.written = count
        self.place.fill_(count - 1)
        self._used.fill_(count if self.window is None else min(count, self.window))

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one token, keys [B, Hkv, 1, D] and values [B, Hkv, 1, Dv], where the device says."""
        self.keys.index_copy_(2, self.place, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.place, values.to(self.values.dtype))

    def tokens(self) -> DenseSegment:
        """The tokens that a plain layer would hold, in the order of the text, in memory of their own."""
        keys, values = (self._in_order(states) for states in (self.keys, self.values))
        return DenseSegment(keys, values)

    def _in_order(self, states: torch.Tensor) -> torch.Tensor:
        if not self.ring:
            return states[:, :, : self.written].clone()
        kept = min(self.written, self.places - 1)
        start = (self.written - kept) % self.places
        before = states[:, :, start : start + kept]
        return torch.cat([before, states[:, :, : kept - before.shape[2]]], dim=2)

    def take(self) -> DenseSegment:
        """The same tokens, for good: of a room that is filled from the front, its own memory."""
        self.taken = True
        return self.tokens() if self.ring else self.held

    def step_segments(self) -> tuple[DenseSegment]:
        """All the room there is, with lengths on the device."""
        return (DenseSegment(self.keys, self.values, self._used, self._starts),)

    def view(self) -> PackedView:
        """The tokens as they are in this step, none of them packed."""
        held = self.held
        keys, values = (
            PackedSide(RawPages(states.shape[-1]), {}, ChannelTransform())
            for states in (held.keys, held.values)
        )
        return PackedView(
            sinks=held,
            packed=PackedSegment(keys, values),
            recent=first(held, 0),
            tokens=held.tokens,
            dtype=held.keys.dtype,
            for_attention=True,
            step=self.step_segments(),
        )

    def addresses(self) -> list[int]:
        """Where everything lies that a step reads and writes."""
        counters = [self.place, self._used, *([] if self._starts is None else [self._starts])]
        return [tensor.data_ptr() for tensor in (self.keys, self.values, *counters)]
