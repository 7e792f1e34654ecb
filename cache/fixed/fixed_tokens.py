"""Packed tokens at fixed addresses: what a decode step can be captured over, and replayed.

A step writes its token at an index that is read on the device, and attends all the room there is, limited by
lengths on the device. So nothing in it depends on how many tokens there are::

    [ sinks | pages, with room for more, `packed` tokens in use | window of recent tokens, `recent` in use ]

Host integers mirror what the device counts: the host alone decides when a full window becomes a page, between
steps, and never asks the device. Sinks, pages and transforms are those of the growing `PackedTokens`, shared,
so going over to this form copies a window of recent tokens and nothing else, and going back likewise.
"""

from dataclasses import dataclass, replace

import torch

from quantpress.cache.fixed.step_counters import StepCounters
from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.head_lengths import HeadLengths
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.cache.tokens.segments import first
from quantpress.cache.tokens.view import PackedView
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, Segment
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True)
class Window:
    """The memory that steps of one layer write to.

    Args:
        keys: [B, Hkv, C, D], room for C recent tokens.
        values: [B, Hkv, C, Dv].
        place: [1] int64, index of the newest token.
        packed: [B, Hkv] int32, tokens in use in pages.
        recent: [B, Hkv] int32, tokens in use here.
        starts: [2, B, Hkv] int32, the first in use of both, where heads keep different tokens; else None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    place: torch.Tensor
    packed: torch.Tensor
    recent: torch.Tensor
    starts: torch.Tensor | None = None

    @classmethod
    def like(cls, tokens: PackedTokens, counters: StepCounters, layer: int) -> "Window":
        """An empty window for a layer's tokens."""
        capacity = window_tokens(tokens.settings)
        keys, values = (
            states.new_zeros((*states.shape[:2], capacity, states.shape[-1]))
            for states in (tokens.recent.keys, tokens.recent.values)
        )
        place, recent, _ = counters.bound(layer, keys.shape[1])
        packed = counters.packed[layer, :, : keys.shape[1]]
        starts = None if tokens.heads is None else packed.new_zeros(2, *packed.shape)
        return cls(keys, values, place, packed, recent, starts)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything in it."""
        return [self.keys, self.values, *self.counters]

    @property
    def counters(self) -> list[torch.Tensor]:
        """What says which tokens are in use."""
        counters = [self.place, self.packed, self.recent]
        return counters if self.starts is None else [*counters, self.starts]

    def fits(self, tokens: PackedTokens) -> bool:
        """Whether it was made for tokens of this shape and kind."""
        pairs = ((self.keys, tokens.recent.keys), (self.values, tokens.recent.values))
        ragged = (tokens.heads is None) == (self.starts is None)
        return (
            ragged
            and self.keys.shape[2] == window_tokens(tokens.settings)
            and all(
                (*own.shape[:2], own.shape[3]) == (*other.shape[:2], other.shape[3])
                and own.dtype == other.dtype
                and own.device == other.device
                for own, other in pairs
            )
        )

    def fill(self, tokens: DenseSegment) -> None:
        """Take recent tokens over."""
        self.keys[:, :, : tokens.tokens] = tokens.keys
        self.values[:, :, : tokens.tokens] = tokens.values

    def drop(self, tokens: int, used: int) -> None:
        """Let the oldest of `used` tokens go; the others move to the front."""
        for states in (self.keys, self.values):
            states[:, :, : used - tokens] = states[:, :, tokens:used].clone()

    def count(self, packed: int, recent: int, heads: HeadLengths | None) -> None:
        """Tell the device which of the packed and recent places are in use."""
        self.place.fill_(recent - 1)
        if heads is None or self.starts is None:
            self.packed.fill_(packed)
            self.recent.fill_(recent)
            return
        for place, part, count in ((0, self.packed, packed), (1, self.recent, recent)):
            lengths, starts = heads.span(place * packed, place * packed + count)
            part.copy_(lengths)
            self.starts[place].copy_(starts)


def window_tokens(settings: LayerSettings) -> int:
    """Recent tokens there are when the oldest become a page."""
    return settings.recent_tokens + PAGE_TOKENS


class FixedTokens(PackedTokens):
    """`PackedTokens` whose recent tokens lie in a `Window`.

    `append` takes one token, for which the device has been told to `advance`; a full window is packed by
    `flush`, between steps. Whatever else is to be done with the tokens is done with `release()`.

    Args:
        tokens: some of them packed; not to be used any more.
        window: for them; written over.

    Raises:
        InvalidInputError: nothing is packed yet.
    """

    def __init__(self, tokens: PackedTokens, window: Window) -> None:
        tokens.flush()
        if not tokens.packed:
            raise InvalidInputError(
                f"none of the {len(tokens)} tokens is packed yet; only packed tokens can be fixed"
            )
        vars(self).update(vars(tokens))
        self.window, self.used = window, tokens.recent.tokens
        window.fill(tokens.recent)
        window.count(self.packed, self.used, self.heads)
        self._recent = first(tokens.recent, 0)

    @property
    def recent(self) -> DenseSegment:
        """The last tokens, as views of the window: the next steps write there."""
        return DenseSegment(self.window.keys[:, :, : self.used], self.window.values[:, :, : self.used])

    @property
    def full(self) -> bool:
        """Whether the window must be flushed before the next step."""
        return self.used == self.window.keys.shape[2]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one token, keys [B, Hkv, 1, D] and values [B, Hkv, 1, Dv], where the device says."""
        self.window.keys.index_copy_(2, self.window.place, keys.to(self.window.keys.dtype))
        self.window.values.index_copy_(2, self.window.place, values.to(self.window.values.dtype))
        self.used += 1

    def flush(self) -> bool:
        """Pack the oldest recent tokens when the window is full.

        Raises:
            NonFiniteError: they hold NaN or infinity; nothing was changed.
        """
        if not self.full:
            return False
        self._pack(first(self.recent, PAGE_TOKENS))
        self.window.drop(PAGE_TOKENS, self.used)
        self.used -= PAGE_TOKENS
        self.window.count(self.packed, self.used, self.heads)
        return True

    def share(self) -> PackedTokens:
        """See `release`."""
        return self.release()

    def release(self) -> PackedTokens:
        """The same tokens in growing form: pages shared, recent tokens copied."""
        other = PackedTokens.__new__(PackedTokens)
        names = vars(self).keys() - {"window", "used"}
        vars(other).update({name: getattr(self, name) for name in names})
        other.pages = self.pages.share()
        other._recent = DenseSegment(self.recent.keys.clone(), self.recent.values.clone())
        return other

    def view(self) -> PackedView:
        """The tokens as they are in this step; the next one writes to the same memory."""
        return replace(super().view(), step=self.step_segments())

    def step_segments(self) -> tuple[Segment, ...]:
        """All the room there is, with lengths on the device."""
        assert self.key_transform is not None and self.value_transform is not None
        window, starts, sinks = self.window, self.window.starts, self.sinks
        if self.heads is not None:
            sinks = self.heads.counted_sinks(sinks)
        packed = self.pages.segment(
            (self.settings.key_codec, self.key_transform),
            (self.settings.value_codec, self.value_transform),
            (window.packed, None if starts is None else starts[0]),
            to_capacity=True,
        )
        recent = DenseSegment(
            window.keys, window.values, window.recent, None if starts is None else starts[1]
        )
        return (sinks, packed, recent) if sinks.tokens else (packed, recent)

    def addresses(self) -> list[int]:
        """Where everything lies that a step reads and writes."""
        tensors = [*self.packed_tensors(), *self.dense_tensors(), *self.metadata_tensors()]
        return [tensor.data_ptr() for tensor in tensors]

    def dense_tensors(self) -> list[torch.Tensor]:
        """The tensors kept in 16 bits: sinks and the window, room included."""
        return [self.sinks.keys, self.sinks.values, self.window.keys, self.window.values]

    def metadata_tensors(self) -> list[torch.Tensor]:
        """Transforms and counters."""
        return [*super().metadata_tensors(), *self.window.counters]
