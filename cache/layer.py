"""`PackedLayer`: one layer of a transformers cache whose keys and values are packed.

The tokens of a layer, in order::

    [ sinks: first `sink_tokens`, 16 bits | whole pages of 128 tokens, packed | recent, 16 bits ]

New tokens join the recent ones. When there are `recent_tokens` + 128 of them the oldest 128 become a page. The channel
transform (mean key, balanced channels) is taken once, from the first tokens that are packed, and never changes, since
pages already packed depend on it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from quantpress.cache.pages import PageStore
from quantpress.cache.states import PackedStates
from quantpress.cache.view import PackedView, decode
from quantpress.codecs.transform import ChannelTransform, key_statistics, value_statistics
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.page_codec import PageCodec

DEFAULT_SINK_TOKENS = 4
DEFAULT_RECENT_TOKENS = 128


@dataclass(frozen=True)
class LayerSettings:
    """How a `PackedLayer` stores tokens.

    Args:
        key_codec: packs keys.
        value_codec: packs values; its head_dim may differ from the keys'.
        sink_tokens: first tokens kept in 16 bits.
        recent_tokens: last tokens kept in 16 bits, at least.
        mean_key: subtract the mean key of each head before encoding.
        balance: weight the key channels of each head before encoding, when queries are known.
    """

    key_codec: PageCodec
    value_codec: PageCodec
    sink_tokens: int = DEFAULT_SINK_TOKENS
    recent_tokens: int = DEFAULT_RECENT_TOKENS
    mean_key: bool = True
    balance: bool = True

    def __post_init__(self) -> None:
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; give 0 or more")


@dataclass(frozen=True)
class LayerSnapshot:
    """What `PackedLayer.restore` goes back to; made by `PackedLayer.snapshot`."""

    state: dict[str, Any]
    key_pages: PageStore
    value_pages: PageStore


class PackedLayer(DynamicLayer):
    """A cache layer that keeps most of its tokens packed.

    It takes the place of a `DynamicLayer` in any transformers cache (`cache.layers[i] = ...`). `update` returns
    `PackedStates`, which attention reads without decoding everything (see `quantpress.cache.attention`).

    Args:
        settings: codecs and windows.

    Example:
        >>> import torch
        >>> from quantpress.codecs.spec import CodecSpec
        >>> from quantpress.kernels.page_codec import ScalarPages
        >>> codecs = [ScalarPages(CodecSpec(head_dim=64, bits=4, role=role)) for role in ("key", "value")]
        >>> layer = PackedLayer(LayerSettings(*codecs))
        >>> keys, values = layer.update(torch.randn(1, 2, 1000, 64), torch.randn(1, 2, 1000, 64))
        >>> layer.get_seq_length(), layer.packed_tokens
        (1000, 768)
    """

    is_sliding = False
    device: torch.device
    dtype: torch.dtype

    def __init__(self, settings: LayerSettings) -> None:
        self.settings = settings
        self.tokens_seen = 0
        self._clear()
        super().__init__()

    def _clear(self) -> None:
        self._key_pages, self._value_pages = PageStore(), PageStore()
        self._sinks: DenseSegment | None = None
        self._recent: DenseSegment | None = None
        self.key_transform: ChannelTransform | None = None
        self.value_transform: ChannelTransform | None = None
        self.is_initialized = False

    @classmethod
    def from_states(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        settings: LayerSettings,
        *,
        query_moment: torch.Tensor | None = None,
        tokens_seen: int | None = None,
    ) -> "PackedLayer":
        """Pack the keys and values of a prefill.

        Args:
            keys: [B, Hkv, T, D] any float dtype, post-RoPE, in token order.
            values: [B, Hkv, T, Dv].
            settings: codecs and windows.
            query_moment: [B, Hkv, D] mean square of the queries that will read these keys, for channel balance.
            tokens_seen: positions used so far, more than T after an eviction; T when left out.

        Returns:
            A layer that shares no storage with `keys` and `values`.

        Raises:
            NonFiniteError: keys or values hold NaN or infinity.
        """
        layer = cls(settings)
        layer.lazy_initialization(keys, values)
        layer._append(keys, values)
        layer._flush(query_moment)
        layer._own()
        layer.tokens_seen = keys.shape[2] if tokens_seen is None else tokens_seen
        return layer

    # --- what transformers calls -------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        empty = DenseSegment(key_states[:, :, :0].clone(), value_states[:, :, :0].clone())
        self._sinks, self._recent = empty, empty
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values, the new ones not yet packed.

        Args:
            key_states: [B, Hkv, N, D].
            value_states: [B, Hkv, N, Dv].
            cache_kwargs: not used.

        Returns:
            Keys and values of every token: plain tensors while nothing is packed, `PackedStates` afterwards.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        self.tokens_seen += key_states.shape[2]
        states = self.keys, self.values  # before packing: the newest tokens are read exactly once more
        if self._flush(None):
            self._own()
        return states

    def get_seq_length(self) -> int:
        """Tokens kept."""
        if self._sinks is None or self._recent is None:
            return 0
        return self._sinks.tokens + self.packed_tokens + self._recent.tokens

    def get_mask_sizes(self, cache_position: torch.Tensor) -> tuple[int, int]:
        """(tokens kept and arriving, offset 0)."""
        return self.get_seq_length() + cache_position.shape[0], 0

    def get_max_cache_shape(self) -> int:
        """-1: there is no largest length."""
        return -1

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative value drops that many from the end.

        Cropping into a page decodes the part of it that stays; packing it again later gives the same codes.
        """
        length = self.get_seq_length()
        keep = length + max_length if max_length < 0 else max_length
        if keep < 0:
            raise InvalidInputError(
                f"crop({max_length}) of a layer with {length} tokens; drop at most {length}"
            )
        if keep >= length or self._sinks is None or self._recent is None:
            return
        self.tokens_seen -= length - keep
        inside = keep - self._sinks.tokens
        if inside >= self.packed_tokens:
            self._recent = _narrow(self._recent, inside - self.packed_tokens)
        elif inside >= 0:
            whole, rest = divmod(inside, PAGE_TOKENS)
            cut = self.view()._pages(whole, whole + 1)
            self._recent = _narrow(
                DenseSegment(decode(cut.keys, self.dtype), decode(cut.values, self.dtype)), rest
            )
            self._crop_pages(whole)
        else:
            self._sinks, self._recent = _narrow(self._sinks, keep), _narrow(self._recent, 0)
            self._crop_pages(0)
        self._own()
        if keep == 0:  # nothing depends on the statistics any more
            self.key_transform = self.value_transform = None

    def reset(self) -> None:
        """Forget every token."""
        self._clear()
        self.tokens_seen = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take batch entries `beam_idx` [B] (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch entry `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep batch entries `indices` (int64 positions or a bool mask)."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Bring everything back to the layer's device."""
        if self._recent is not None and self._recent.keys.device != self.device:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys [B, Hkv, T, D]: `PackedStates` when some are packed. Assigning a shorter slice of them crops."""
        return self._states("keys")

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._assign(value)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values [B, Hkv, T, Dv]; see `keys`."""
        return self._states("values")

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._assign(value)

    # --- ours ----------------------------------------------------------------------------------------------------

    @property
    def packed_tokens(self) -> int:
        """Tokens in packed pages."""
        return self._key_pages.pages * PAGE_TOKENS

    def view(self) -> PackedView:
        """The tokens as they are now; later changes of the layer do not show in it."""
        if (
            self._sinks is None
            or self._recent is None
            or self.key_transform is None
            or self.value_transform is None
        ):
            raise InvalidInputError("this layer has no packed page yet; read `keys` and `values`")
        return PackedView(
            sinks=self._sinks,
            packed=PackedSegment(
                PackedSide(self.settings.key_codec, self._key_pages.planes, self.key_transform),
                PackedSide(self.settings.value_codec, self._value_pages.planes, self.value_transform),
            ),
            recent=self._recent,
            tokens=self.get_seq_length(),
            dtype=self.dtype,
        )

    def dense_tensors(self) -> list[torch.Tensor]:
        """The tensors kept in 16 bits (or the model's dtype): sinks and recent tokens."""
        segments = [segment for segment in (self._sinks, self._recent) if segment is not None]
        return [tensor for segment in segments for tensor in (segment.keys, segment.values)]

    def packed_tensors(self) -> list[torch.Tensor]:
        """The planes of keys and values, room to grow included."""
        return self._key_pages.tensors + self._value_pages.tensors

    def metadata_tensors(self) -> list[torch.Tensor]:
        """The channel transforms."""
        transforms = [t for t in (self.key_transform, self.value_transform) if t is not None]
        return [tensor for transform in transforms for tensor in transform.tensors().values()]

    def snapshot(self) -> LayerSnapshot:
        """The state to come back to with `restore`. Nothing is copied."""
        kept = {
            name: value for name, value in vars(self).items() if name not in ("_key_pages", "_value_pages")
        }
        return LayerSnapshot(kept, self._key_pages.share(), self._value_pages.share())

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Go back to a snapshot of this layer; tokens that came later are gone. May be repeated."""
        vars(self).update(snapshot.state)
        self._key_pages, self._value_pages = snapshot.key_pages.share(), snapshot.value_pages.share()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedLayer":
        other = copy.copy(self)
        memo[id(self)] = other
        other._map(torch.clone)
        return other

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self._sinks is not None and self._recent is not None
        missing = 0
        if not self._key_pages.pages and not self._recent.tokens:
            missing = min(self.settings.sink_tokens - self._sinks.tokens, keys.shape[2])
        if missing > 0:
            self._sinks = _join(self._sinks, keys[:, :, :missing], values[:, :, :missing])
            keys, values = keys[:, :, missing:], values[:, :, missing:]
        if keys.shape[2]:
            self._recent = _join(self._recent, keys, values)

    def _flush(self, query_moment: torch.Tensor | None) -> bool:
        """Pack the oldest recent tokens as far as whole pages go; True when there were some."""
        assert self._recent is not None
        pages = max(0, self._recent.tokens - self.settings.recent_tokens) // PAGE_TOKENS
        if pages == 0:
            return False
        old = _narrow(self._recent, pages * PAGE_TOKENS)
        with torch.no_grad():
            if self.key_transform is None or self.value_transform is None:
                self._take_statistics(old, query_moment)
            assert self.key_transform is not None and self.value_transform is not None
            key_planes = self.settings.key_codec.encode(old.keys, self.key_transform)
            value_planes = self.settings.value_codec.encode(old.values, self.value_transform)
        self._key_pages.append(key_planes)
        self._value_pages.append(value_planes)
        rest = pages * PAGE_TOKENS
        self._recent = DenseSegment(self._recent.keys[:, :, rest:], self._recent.values[:, :, rest:])
        return True

    def _take_statistics(self, old: DenseSegment, query_moment: torch.Tensor | None) -> None:
        keys, values = self.settings.key_codec, self.settings.value_codec
        identity = ChannelTransform(None, None, None)
        self.key_transform = self.value_transform = identity
        if keys.wants_statistics:
            moment = query_moment if self.settings.balance else None
            self.key_transform = key_statistics(
                old.keys, moment, keys.groups, mean=self.settings.mean_key, balance=self.settings.balance
            )
        if values.wants_statistics:
            self.value_transform = value_statistics(old.values, values.groups)

    def _crop_pages(self, pages: int) -> None:
        self._key_pages.crop(pages)
        self._value_pages.crop(pages)

    def _own(self) -> None:
        """Let go of larger storages that the 16-bit tokens are slices of."""
        if self._sinks is not None and self._recent is not None:
            self._sinks, self._recent = _compact(self._sinks), _compact(self._recent)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._sinks is None or self._recent is None:
            return
        self._sinks = DenseSegment(change(self._sinks.keys), change(self._sinks.values))
        self._recent = DenseSegment(change(self._recent.keys), change(self._recent.values))
        self._key_pages, self._value_pages = self._key_pages.map(change), self._value_pages.map(change)
        if self.key_transform is not None and self.value_transform is not None:
            self.key_transform = self.key_transform.map(change)
            self.value_transform = self.value_transform.map(change)

    def _states(self, side: str) -> torch.Tensor | None:
        if self._sinks is None or self._recent is None:
            return None
        if self._key_pages.pages:
            return PackedStates(self.view(), side)
        return torch.cat([getattr(self._sinks, side), getattr(self._recent, side)], dim=2)

    def _assign(self, value: torch.Tensor | None) -> None:
        """What presses do: trim to the first tokens. Anything else would pack decoded numbers a second time."""
        if value is None and not self.is_initialized:
            return
        length = self.get_seq_length()
        trims = value is not None and value.shape[2] <= length
        if trims and self._key_pages.pages:
            trims = isinstance(value, PackedStates) and value.packed is not None
        if not trims or value is None:
            shape = None if value is None else tuple(value.shape)
            raise InvalidInputError(
                f"a packed layer of {length} tokens was assigned keys or values of shape {shape}; it can only be cut "
                "short (`keys[:, :, :n]`, `crop(n)`). A press that changes keys must come before TurboQuant in Compose"
            )
        self.crop(value.shape[2])


def _narrow(segment: DenseSegment, tokens: int) -> DenseSegment:
    return DenseSegment(segment.keys[:, :, :tokens], segment.values[:, :, :tokens])


def _join(segment: DenseSegment, keys: torch.Tensor, values: torch.Tensor) -> DenseSegment:
    if not segment.tokens:
        return DenseSegment(keys, values)
    return DenseSegment(torch.cat([segment.keys, keys], dim=2), torch.cat([segment.values, values], dim=2))


def _compact(segment: DenseSegment) -> DenseSegment:
    return DenseSegment(_compact_tensor(segment.keys), _compact_tensor(segment.values))


def _compact_tensor(tensor: torch.Tensor) -> torch.Tensor:
    needed = tensor.numel() * tensor.element_size()
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == needed:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
