"""`TokenBuffer`: memory of a fixed size for the tokens of a layer that nothing packs; steps write to it."""

import torch

from quantpress.cache.attention.dispatch import PACKED_ATTENTION
from quantpress.cache.fixed.step_counters import StepCounters
from quantpress.cache.tokens.fixed_tokens import StepMemory
from quantpress.cache.tokens.segments import after, first
from quantpress.cache.tokens.view import PackedView
from quantpress.codecs.raw import RawPages
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide
from quantpress.quantization.transform import ChannelTransform


class TokenBuffer(StepMemory):
    """Memory for the tokens of one plain layer. While it exists, attention reads packed states.

    Args:
        like: as for `StepMemory`.
        capacity: as there.
        counters: of all layers.
        layer: index of its own layer.
        window: how many tokens a query sees, its own included; None: all.
        ring: after the last slot, tokens are written to the first again; the capacity is then the window.

    Attributes:
        written: tokens written so far, also those that were overwritten since.
        taken: whether its memory belongs to someone else now.
    """

    def __init__(
        self,
        like: DenseSegment,
        capacity: int,
        counters: StepCounters,
        layer: int,
        window: int | None,
        ring: bool,
    ) -> None:
        PACKED_ATTENTION.in_place_while_alive(self)
        newest, self._used, self._starts = counters.bound(layer, like.kv_heads, window, ring)
        super().__init__(like, capacity, newest)
        self.window, self.ring, self.written, self.taken = window, ring, 0, False

    @property
    def full(self) -> bool:
        """Whether there is no slot for the next token."""
        return not self.ring and self.written == self.capacity

    @property
    def in_use(self) -> DenseSegment:
        """The slots in use, as views, in the order of slots."""
        return self.first(min(self.written, self.capacity))

    def suits(self, tokens: DenseSegment, capacity: int) -> bool:
        """Whether it is free and can take tokens of this kind, `capacity` of them."""
        return not self.taken and self.capacity >= capacity and self.takes(tokens)

    def fill(self, tokens: DenseSegment) -> None:
        """Copy tokens in the order of the text, a ring the last of them, and tell the device."""
        if self.ring:
            tokens = after(tokens, max(0, tokens.tokens - self.capacity + 1))
        self.write(tokens)
        self.written = count = tokens.tokens
        self.newest.fill_(count - 1)
        self._used.fill_(count if self.window is None else min(count, self.window))

    def tokens(self) -> DenseSegment:
        """The tokens that a plain layer would hold, in the order of the text, in memory of their own."""
        keys, values = (self._in_order(states) for states in (self.keys, self.values))
        return DenseSegment(keys, values)

    def _in_order(self, states: torch.Tensor) -> torch.Tensor:
        if not self.ring:
            return states[:, :, : self.written].clone()
        kept = min(self.written, self.capacity - 1)
        start = (self.written - kept) % self.capacity
        before = states[:, :, start : start + kept]
        return torch.cat([before, states[:, :, : kept - before.shape[2]]], dim=2)

    def take(self) -> DenseSegment:
        """The same tokens, to keep. Without a ring they are views, and nothing is written here any more."""
        self.taken = True
        return self.tokens() if self.ring else self.in_use

    def step_segments(self) -> tuple[DenseSegment]:
        """The whole memory, with lengths on the device."""
        return (DenseSegment(self.keys, self.values, self._used, self._starts),)

    def view(self) -> PackedView:
        """The tokens as they are in this step, none of them packed."""
        in_use = self.in_use
        keys, values = (
            PackedSide(RawPages(states.shape[-1]), {}, ChannelTransform())
            for states in (in_use.keys, in_use.values)
        )
        return PackedView(
            sinks=in_use,
            packed=PackedSegment(keys, values),
            recent=first(in_use, 0),
            tokens=in_use.tokens,
            dtype=in_use.keys.dtype,
            for_attention=True,
            step=self.step_segments(),
        )

    def addresses(self) -> list[int]:
        """The addresses of everything that a step reads and writes."""
        counters = [self.newest, self._used, *([] if self._starts is None else [self._starts])]
        return [tensor.data_ptr() for tensor in (self.keys, self.values, *counters)]
