"""`FixedTokens`: packed tokens at fixed addresses, for decode steps that are captured and replayed.

A step writes its token at an index that it reads on the device, and attends to the whole memory, limited by
lengths on the device. So nothing in it depends on how many tokens there are::

    [ sinks | demoted tokens | pages, with spare ones, `packed` tokens in use | window, `recent` in use ]

The host counts what the device counts. Between steps, the host alone decides when the oldest tokens of a full
window become a page, and never asks the device. Sinks, pages and transforms stay those of the `PackedTokens`
held here. Only the window of recent tokens is copied, on the way in and on the way out.
"""

from dataclasses import dataclass, replace

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.head_lengths import HeadLengths
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.cache.tokens.segments import first
from quantpress.cache.tokens.view import PackedView
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, Segment
from quantpress.kernels.joined import write_token
from quantpress.kernels.layout import PAGE_TOKENS


class StepMemory:
    """Memory at fixed addresses for keys and values of one layer; each step writes one token to it.

    Args:
        like: keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of the kind that it is for.
        capacity: C, how many tokens it has memory for.
        newest: [1] int64, index of the newest token.

    Attributes:
        keys, values: [B, Hkv, C, D], [B, Hkv, C, Dv].
    """

    def __init__(self, like: DenseSegment, capacity: int, newest: torch.Tensor) -> None:
        self.newest = newest
        with torch.inference_mode(False), torch.no_grad():  # so that any mode may write to it
            self.keys, self.values = (
                states.new_zeros((*states.shape[:2], capacity, states.shape[-1]))
                for states in (like.keys, like.values)
            )

    @property
    def capacity(self) -> int:
        """How many tokens it has memory for."""
        return self.keys.shape[2]

    def first(self, tokens: int) -> DenseSegment:
        """The first `tokens` tokens, as views, which the next steps write to."""
        return first(DenseSegment(self.keys, self.values), tokens)

    def takes(self, tokens: DenseSegment) -> bool:
        """Whether it can take tokens of this shape, dtype and device."""
        return all(
            (*own.shape[:2], own.shape[3]) == (*other.shape[:2], other.shape[3])
            and (own.dtype, own.device) == (other.dtype, other.device)
            for own, other in ((self.keys, tokens.keys), (self.values, tokens.values))
        )

    def write(self, tokens: DenseSegment) -> None:
        """Copy tokens to the front."""
        self.keys[:, :, : tokens.tokens] = tokens.keys
        self.values[:, :, : tokens.tokens] = tokens.values

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one token, keys [B, Hkv, 1, D] and values [B, Hkv, 1, Dv], at the index on the device."""
        write_token(self.keys, self.values, self.newest, keys, values)


@dataclass
class Shown:
    """Which tokens of a layer count in a batch with padding on the left: sinks, pages and recent tokens.

    Args:
        lengths: [3, B, Hkv] int32, how many of each.
        starts: [3, B, Hkv] int32, the first of them.
        active: whether the batch has padding.
    """

    lengths: torch.Tensor
    starts: torch.Tensor
    active: bool = False


class Window(StepMemory):
    """The memory for the recent tokens of a packed layer, and what counts the layer's tokens on the device.

    Args:
        tokens: of the layer; not copied.
        newest: [1] int64, index of the newest token.
        packed: [B, Hkv] int32, tokens in use in pages.
        recent: [B, Hkv] int32, tokens in use here.
        shown: those that count in a padded batch.

    Attributes:
        starts: [2, B, Hkv] int32, the first token in use in pages and here, where heads keep different
            tokens; else None.
    """

    def __init__(
        self,
        tokens: PackedTokens,
        newest: torch.Tensor,
        packed: torch.Tensor,
        recent: torch.Tensor,
        shown: Shown | None = None,
    ) -> None:
        super().__init__(tokens.recent, window_tokens(tokens.settings), newest)
        self.packed, self.recent, self.shown = packed, recent, shown
        self.starts = None if tokens.heads is None else packed.new_zeros(2, *packed.shape)

    @property
    def counters(self) -> list[torch.Tensor]:
        """The tensors that say which tokens are in use."""
        counters = [self.newest, self.packed, self.recent]
        if self.shown is not None and self.shown.active:
            counters += [self.shown.lengths, self.shown.starts]
        return counters if self.starts is None else [*counters, self.starts]

    def fits(self, tokens: PackedTokens) -> bool:
        """Whether it was made for tokens of this shape and kind."""
        ragged = (tokens.heads is None) == (self.starts is None)
        return ragged and self.capacity == window_tokens(tokens.settings) and self.takes(tokens.recent)

    def drop(self, tokens: int, used: int) -> None:
        """Remove the oldest of `used` tokens; the others move to the front."""
        for states in (self.keys, self.values):
            states[:, :, : used - tokens] = states[:, :, tokens:used].clone()

    def count(self, packed: int, recent: int, heads: HeadLengths | None) -> None:
        """Tell the device which of the packed and recent tokens are in use."""
        self.newest.fill_(recent - 1)
        if heads is None or self.starts is None:
            self.packed.fill_(packed)
            self.recent.fill_(recent)
            return
        for index, part, count in ((0, self.packed, packed), (1, self.recent, recent)):
            lengths, starts = heads.span(index * packed, index * packed + count)
            part.copy_(lengths)
            self.starts[index].copy_(starts)


def window_tokens(settings: LayerSettings) -> int:
    """How many recent tokens there are when the oldest become a page."""
    return settings.recent_tokens + PAGE_TOKENS


class FixedTokens:
    """`PackedTokens` whose recent tokens lie in a `Window`.

    `append` takes one token, which the device has already counted; `flush` packs a full window between steps.
    For anything else that is to be done with the tokens, call `release`.

    Args:
        tokens: some of them packed. Their pages are shared.
        window: for the recent tokens; what it holds is overwritten.

    Attributes:
        used: recent tokens, as the host counts them.

    Raises:
        InvalidInputError: nothing is packed yet.
    """

    def __init__(self, tokens: PackedTokens, window: Window) -> None:
        tokens.flush()
        if not tokens.packed:
            raise InvalidInputError(
                f"none of the {len(tokens)} tokens is packed yet; only packed tokens can be fixed"
            )
        self._tokens = tokens.share()
        recent = self._tokens.take_recent()
        self.window, self.used = window, recent.tokens
        window.write(recent)
        window.count(tokens.packed, self.used, tokens.heads)

    @property
    def recent(self) -> DenseSegment:
        """The last tokens, as views of the window."""
        return self.window.first(self.used)

    @property
    def packed(self) -> int:
        """Tokens in packed pages; see `PackedTokens.packed`."""
        return self._tokens.packed

    @property
    def packed_tokens(self) -> int:
        """Tokens in packed pages, of the head with most of them."""
        return self._tokens.packed_tokens

    @property
    def full(self) -> bool:
        """Whether the window must be flushed before the next step."""
        return self.used == self.window.capacity

    @property
    def in_order(self) -> bool:
        """Whether every head holds the same tokens, one after the other."""
        return self._tokens.heads is None and self._tokens.demoted is None

    def __len__(self) -> int:
        """Slots; see `PackedTokens`."""
        return len(self._tokens) + self.used

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one token, keys [B, Hkv, 1, D] and values [B, Hkv, 1, Dv], at the index on the device."""
        self.window.append(keys, values)
        self.used += 1

    def flush(self) -> bool:
        """Pack the oldest recent tokens if the window is full.

        Returns:
            Whether it was.

        Raises:
            NonFiniteError: they hold NaN or infinity; nothing was changed.
        """
        if not self.full:
            return False
        self._tokens.pack(first(self.recent, PAGE_TOKENS))
        self.window.drop(PAGE_TOKENS, self.used)
        self.used -= PAGE_TOKENS
        self.window.count(self.packed, self.used, self._tokens.heads)
        return True

    def release(self) -> PackedTokens:
        """The same tokens in growing form: pages shared, recent tokens copied."""
        tokens = self._tokens.share()
        tokens.append(self.recent.keys.clone(), self.recent.values.clone())
        return tokens

    def view(self) -> PackedView:
        """The tokens as they are in this step; the next one writes to the same memory."""
        view = self._tokens.view()
        return replace(view, recent=self.recent, tokens=len(self), step=self.step_segments())

    def step_segments(self) -> tuple[Segment, ...]:
        """The whole memory, with lengths on the device."""
        window, heads, sinks = self.window, self._tokens.heads, self._tokens.sinks
        if window.shown is not None and window.shown.active:
            return self._shown_segments(window.shown)
        starts = (None, None) if window.starts is None else window.starts
        packed = self._tokens.packed_segment((window.packed, starts[0]), to_capacity=True)
        recent = DenseSegment(window.keys, window.values, window.recent, starts[1])
        demoted = self._tokens.demoted
        pages = (packed,) if demoted is None else (demoted.segment(), packed)
        if not sinks.tokens:
            return *pages, recent
        return sinks if heads is None else heads.counted_sinks(sinks), *pages, recent

    def _shown_segments(self, shown: Shown) -> tuple[Segment, ...]:
        first, pages, recent = zip(shown.lengths, shown.starts, strict=True)
        segments: list[Segment] = [self._tokens.packed_segment(pages, to_capacity=True)]
        segments.append(DenseSegment(self.window.keys, self.window.values, *recent))
        sinks = self._tokens.sinks
        return (
            (replace(sinks, lengths=first[0], starts=first[1]), *segments) if sinks.tokens else (*segments,)
        )

    def addresses(self) -> list[int]:
        """The addresses of everything that a step reads and writes."""
        tensors = [*self.packed_tensors(), *self.dense_tensors(), *self.metadata_tensors()]
        return [tensor.data_ptr() for tensor in tensors]

    def dense_tensors(self) -> list[torch.Tensor]:
        """The tensors kept in 16 bits: sinks and the whole window."""
        sinks = self._tokens.sinks
        return [sinks.keys, sinks.values, self.window.keys, self.window.values]

    def packed_tensors(self) -> list[torch.Tensor]:
        """See `PackedTokens.packed_tensors`."""
        return self._tokens.packed_tensors()

    def metadata_tensors(self) -> list[torch.Tensor]:
        """What `PackedTokens.metadata_tensors` has, and the counters."""
        return [*self._tokens.metadata_tensors(), *self.window.counters]
