"""`PackedTokens`: the keys and values of one layer, most of them in packed pages.

The tokens, in order::

    [ sinks: first `sink_tokens`, 16 bits | whole pages of 128 tokens, packed | recent, 16 bits ]

New tokens join the recent ones. When there are `recent_tokens` + 128 of them the oldest 128 become a page.
The channel transform (mean key, balanced channels) is taken once, from the first tokens that are packed, and
never changes, since pages already packed depend on it. `quantpress.cache.fixed` has the form of these tokens
that a captured decode step reads and writes.
"""

import copy
from collections.abc import Callable

import torch

from quantpress.cache.pages import PageStore
from quantpress.cache.segments import after, compact, first, join
from quantpress.cache.settings import LayerSettings
from quantpress.cache.view import PackedView, decode_segment
from quantpress.codecs.transform import ChannelTransform, key_statistics, value_statistics
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide
from quantpress.kernels.layout import PAGE_TOKENS


class PackedTokens:
    """Sinks, pages and recent tokens of one layer.

    Args:
        settings: codecs and windows.
        keys: [B, Hkv, T, D], the first tokens; T may be 0. Gives dtype, device and shapes.
        values: [B, Hkv, T, Dv].

    Attributes:
        sinks: the first tokens, in 16 bits.
        key_pages, value_pages: the packed ones.
        query_moment: [B, Hkv, D] mean square of the queries, if known before the first page is packed.
        key_transform, value_transform: what was done to channels before packing; None until then.
    """

    def __init__(self, settings: LayerSettings, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.settings = settings
        self.dtype = keys.dtype
        empty = DenseSegment(keys[:, :, :0].clone(), values[:, :, :0].clone())
        self.sinks, self._recent = empty, empty
        self.key_pages, self.value_pages = PageStore(), PageStore()
        self.key_transform: ChannelTransform | None = None
        self.value_transform: ChannelTransform | None = None
        self.query_moment: torch.Tensor | None = None
        self.append(keys, values)

    @property
    def recent(self) -> DenseSegment:
        """The last tokens, in 16 bits."""
        return self._recent

    @property
    def packed(self) -> int:
        """Tokens in packed pages."""
        return self.key_pages.pages * PAGE_TOKENS

    def __len__(self) -> int:
        return self.sinks.tokens + self.packed + self.recent.tokens

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens behind the last, in 16 bits: keys [B, Hkv, N, D], values [B, Hkv, N, Dv]."""
        new = DenseSegment(keys, values)
        if not self.packed and not self.recent.tokens:
            missing = min(self.settings.sink_tokens - self.sinks.tokens, new.tokens)
            if missing > 0:
                self.sinks, new = join(self.sinks, first(new, missing)), after(new, missing)
        self._recent = join(self._recent, new)

    def flush(self) -> bool:
        """Pack the oldest recent tokens as far as whole pages go.

        Returns:
            Whether there were any.

        Raises:
            NonFiniteError: they hold NaN or infinity; nothing was changed.
        """
        tokens = max(0, self.recent.tokens - self.settings.recent_tokens) // PAGE_TOKENS * PAGE_TOKENS
        if tokens == 0:
            return False
        self._pack(first(self.recent, tokens))
        self._recent = after(self._recent, tokens)
        self.own()
        return True

    def reserve(self, tokens: int) -> None:
        """Make room for the pages that `tokens` more tokens will fill; nothing where none is packed yet."""
        pages = (self.packed + self.recent.tokens + tokens) // PAGE_TOKENS
        self.key_pages.reserve(pages)
        self.value_pages.reserve(pages)

    def _pack(self, old: DenseSegment) -> None:
        """Put tokens behind the last page, a whole number of pages."""
        with torch.no_grad():
            key_transform, value_transform = self._transforms(old)
            key_planes = self.settings.key_codec.encode(old.keys, key_transform)
            value_planes = self.settings.value_codec.encode(old.values, value_transform)
        self.key_transform, self.value_transform, self.query_moment = key_transform, value_transform, None
        self.key_pages.append(key_planes)
        self.value_pages.append(value_planes)

    def _transforms(self, old: DenseSegment) -> tuple[ChannelTransform, ChannelTransform]:
        if self.key_transform is not None and self.value_transform is not None:
            return self.key_transform, self.value_transform
        settings, key_transform, value_transform = self.settings, ChannelTransform(), ChannelTransform()
        if settings.key_codec.wants_statistics:
            key_transform = key_statistics(
                old.keys,
                self.query_moment,
                settings.key_codec.groups,
                mean=settings.mean_key,
                balance=settings.balance,
            )
        if settings.value_codec.wants_statistics:
            value_transform = value_statistics(old.values, settings.value_codec.groups)
        return key_transform, value_transform

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`; what stays of a page is decoded, and packed again gives the same codes."""
        inside = tokens - self.sinks.tokens
        if inside >= self.packed:
            self._recent = first(self._recent, inside - self.packed)
        elif inside >= 0:
            whole, rest = divmod(inside, PAGE_TOKENS)
            view = self.view()
            self._recent = first(decode_segment(view.pages(whole, whole + 1), self.dtype), rest)
            self._crop_pages(whole)
        else:
            self.sinks, self._recent = first(self.sinks, tokens), first(self._recent, 0)
            self._crop_pages(0)
        self.own()
        if tokens == 0:  # nothing depends on the statistics any more
            self.key_transform = self.value_transform = None

    def _crop_pages(self, pages: int) -> None:
        self.key_pages.crop(pages)
        self.value_pages.crop(pages)

    def own(self) -> None:
        """Let go of larger storages that the 16-bit tokens are slices of."""
        self.sinks, self._recent = compact(self.sinks), compact(self._recent)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change` to every tensor; each has the batch first (index the batch, move, clone)."""
        self.sinks = DenseSegment(change(self.sinks.keys), change(self.sinks.values))
        self._recent = DenseSegment(change(self._recent.keys), change(self._recent.values))
        self.key_pages, self.value_pages = self.key_pages.map(change), self.value_pages.map(change)
        if self.query_moment is not None:
            self.query_moment = change(self.query_moment)
        if self.key_transform is not None and self.value_transform is not None:
            self.key_transform = self.key_transform.map(change)
            self.value_transform = self.value_transform.map(change)

    def share(self) -> "PackedTokens":
        """The same tokens over the same memory; changes of one do not show in the other."""
        other = copy.copy(self)
        other.key_pages, other.value_pages = self.key_pages.share(), self.value_pages.share()
        return other

    def view(self) -> PackedView:
        """The tokens as they are now; later changes do not show in it.

        Raises:
            InvalidInputError: nothing is packed yet.
        """
        if self.key_transform is None or self.value_transform is None or not self.packed:
            raise InvalidInputError(f"none of the {len(self)} tokens is packed yet; read them with `states`")
        settings = self.settings
        return PackedView(
            sinks=self.sinks,
            packed=PackedSegment(
                PackedSide(settings.key_codec, self.key_pages.planes, self.key_transform),
                PackedSide(settings.value_codec, self.value_pages.planes, self.value_transform),
            ),
            recent=self.recent,
            tokens=len(self),
            dtype=self.dtype,
            held=(self.key_pages.share(), self.value_pages.share()),
        )

    def dense_tensors(self) -> list[torch.Tensor]:
        """The tensors kept in 16 bits (or the model's dtype): sinks and recent tokens."""
        return [t for segment in (self.sinks, self.recent) for t in (segment.keys, segment.values)]

    def packed_tensors(self) -> list[torch.Tensor]:
        """The planes of keys and values, room to grow included."""
        return self.key_pages.tensors + self.value_pages.tensors

    def metadata_tensors(self) -> list[torch.Tensor]:
        """The channel transforms, and the query moment that the first is made of."""
        transforms = [t for t in (self.key_transform, self.value_transform) if t is not None]
        tensors = [tensor for transform in transforms for tensor in transform.tensors().values()]
        return tensors if self.query_moment is None else [*tensors, self.query_moment]
