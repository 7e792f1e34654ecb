"""`PackedTokens`: the keys and values of one layer, most of them in packed pages.

The tokens, in order::

    [ sinks: first `sink_tokens`, 16 bits | whole pages of 128 tokens, packed | recent, 16 bits ]

New tokens join the recent ones. When there are `recent_tokens` + 128 of them the oldest 128 become a page.
The channel transform (mean key, balanced channels) is taken once, from the first tokens that are packed, and
never changes, since pages already packed depend on it.

After a head-wise eviction heads keep different numbers of tokens (`HeadCounts`, `RaggedPages`); see
`cache/tokens/eviction.py`. `FixedTokens` has the form of these tokens that a captured decode step reads and
writes.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.head_counts import HeadCounts
from quantpress.cache.tokens.head_pages import EvenPages, HeadPages
from quantpress.cache.tokens.pages import PageStore
from quantpress.cache.tokens.segments import after, compact, first, join
from quantpress.cache.tokens.view import PackedView, decode_segment
from quantpress.cache.transforms import transforms_of
from quantpress.codecs.page_codec import Planes
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform

if TYPE_CHECKING:
    from quantpress.cache.tokens.demotion import CoarsePages


class PackedTokens:
    """Sinks, pages and recent tokens of one layer.

    Args:
        settings: codecs and windows.
        keys: [B, Hkv, T, D], the first tokens; T may be 0. Gives dtype, device and shapes.
        values: [B, Hkv, T, Dv].

    Attributes:
        sinks: the first tokens, in 16 bits.
        pages: the packed ones.
        heads: which of them each head keeps; None: all.
        coarse: pages of fewer bits between the sinks and the others, if there are any.
        query_moment: [B, Hkv, D] mean square of the queries, if known before the first page is packed.
        key_transform, value_transform: what was done to channels before packing; None until then.
    """

    def __init__(self, settings: LayerSettings, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.settings = settings
        self.dtype = keys.dtype
        empty = DenseSegment(keys[:, :, :0].clone(), values[:, :, :0].clone())
        self.sinks, self._recent = empty, empty
        self.pages: HeadPages = EvenPages()
        self.heads: HeadCounts | None = None
        self.coarse: CoarsePages | None = None
        self.key_transform: ChannelTransform | None = None
        self.value_transform: ChannelTransform | None = None
        self.query_moment: torch.Tensor | None = None
        self.append(keys, values)

    @property
    def recent(self) -> DenseSegment:
        """The last tokens, in 16 bits."""
        return self._recent

    @property
    def key_pages(self) -> PageStore:
        """The planes of the packed keys."""
        return self.pages.keys

    @property
    def value_pages(self) -> PageStore:
        """The planes of the packed values."""
        return self.pages.values

    @property
    def packed(self) -> int:
        """Tokens in packed pages; places for them, where heads keep different numbers."""
        return self.pages.pages * PAGE_TOKENS

    @property
    def packed_tokens(self) -> int:
        """Tokens in packed pages of any width, of the head with most of them."""
        return (
            self.coarse_tokens
            + self.packed
            - (0 if self.heads is None else min(self.packed, self.heads.least_absent))
        )

    @property
    def places(self) -> int:
        """Places for tokens, in use or not."""
        return self.sinks.tokens + self.coarse_tokens + self.packed + self.recent.tokens

    @property
    def coarse_tokens(self) -> int:
        """Tokens in pages of fewer bits."""
        return 0 if self.coarse is None else self.coarse.tokens

    @property
    def readable(self) -> bool:
        """Whether attention reads them as a `view`, and not as plain tensors."""
        return bool(self.packed) or self.heads is not None or self.coarse is not None

    def __len__(self) -> int:
        """Slots: the tokens that the text had, less those that were evicted in all heads alike."""
        return self.places + (0 if self.heads is None else self.heads.evicted)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens behind the last, in 16 bits: keys [B, Hkv, N, D], values [B, Hkv, N, Dv]."""
        new = DenseSegment(keys, values)
        if not self.readable and not self.recent.tokens:
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
        self.pages.reserve(pages)

    def _pack(self, old: DenseSegment) -> None:
        """Put tokens behind the last page, a whole number of pages."""
        in_use = None if self.heads is None else self.heads.in_use(self.packed, self.packed + old.tokens)
        key_planes, value_planes = self.encode(old, old, in_use)
        self.pages.append(key_planes, value_planes)

    def encode(
        self, tokens: DenseSegment, basis: DenseSegment, in_use: torch.Tensor | None
    ) -> tuple[Planes, Planes]:
        """Planes [B, Hkv, P, ...] of a whole number of pages.

        Args:
            tokens: P * 128 tokens.
            basis: what the channel transform is taken from, when there is none yet.
            in_use: [B, Hkv, T] bool, which tokens of the basis count; None: all.

        Raises:
            NonFiniteError: they hold NaN or infinity; nothing was changed.
        """
        with torch.no_grad():
            key_transform, value_transform = self.key_transform, self.value_transform
            if key_transform is None or value_transform is None:
                key_transform, value_transform = transforms_of(
                    self.settings, basis, self.query_moment, in_use
                )
            key_planes = self.settings.key_codec.encode(tokens.keys, key_transform)
            value_planes = self.settings.value_codec.encode(tokens.values, value_transform)
        self.key_transform, self.value_transform, self.query_moment = key_transform, value_transform, None
        return key_planes, value_planes

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens`; what stays of a page is decoded.

        Packed again it gives the same codes, but for a vector in some thousands: one with a coordinate far
        beyond the last level, which is shorter in code space than its scale says.

        Raises:
            InvalidInputError: heads keep different tokens of those that were to be the last, or they are in
                pages of fewer bits.
        """
        places = tokens
        if self.heads is not None and tokens:
            self.heads.check_whole(tokens)
            places -= self.heads.evicted
        if self.coarse is not None and tokens:
            self.coarse.check_whole(tokens, self.sinks.tokens)
        inside = places - self.sinks.tokens - self.coarse_tokens
        if inside >= self.packed:
            self._recent = first(self._recent, inside - self.packed)
        elif inside >= 0:
            whole, rest = divmod(inside, PAGE_TOKENS)
            cut = decode_segment(self.view().pages(whole, whole + 1), self.dtype)
            self._recent = first(cut, rest)
            self.pages.crop(whole)
        else:
            self.sinks, self._recent = first(self.sinks, places), first(self._recent, 0)
            self.pages.crop(0)
        if tokens == 0:  # nothing depends on the statistics any more
            self.key_transform = self.value_transform = None
            self.pages, self.heads, self.coarse = EvenPages(), None, None
        self.own()

    def replace_dense(self, sinks: DenseSegment, recent: DenseSegment) -> None:
        """Put others in the place of the tokens in 16 bits."""
        self.sinks, self._recent = sinks, recent
        self.own()

    def own(self) -> None:
        """Let go of larger storages that the 16-bit tokens are slices of."""
        self.sinks, self._recent = compact(self.sinks), compact(self._recent)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change` to every tensor: move it, or copy it."""
        self._change(change)
        self.pages = self.pages.map(change)

    def select(self, entries: torch.Tensor) -> None:
        """Take batch entries [B'] int64, any of them more than once."""
        self._change(lambda tensor: tensor.index_select(0, entries.to(tensor.device)))
        self.pages = self.pages.select(entries.to(self.sinks.device))

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """What is not in pages; each tensor has the batch first."""
        self.sinks = DenseSegment(change(self.sinks.keys), change(self.sinks.values))
        self._recent = DenseSegment(change(self._recent.keys), change(self._recent.values))
        if self.heads is not None:
            self.heads = self.heads.map(change)
        if self.coarse is not None:
            self.coarse = self.coarse.map(change)
        if self.query_moment is not None:
            self.query_moment = change(self.query_moment)
        if self.key_transform is not None and self.value_transform is not None:
            self.key_transform = self.key_transform.map(change)
            self.value_transform = self.value_transform.map(change)

    def share(self) -> "PackedTokens":
        """The same tokens over the same memory; changes of one do not show in the other."""
        other = copy.copy(self)
        other.pages = self.pages.share()
        return other

    def view(self) -> PackedView:
        """The tokens as they are now; later changes do not show in it.

        Raises:
            InvalidInputError: nothing is packed yet.
        """
        if not self.readable:
            raise InvalidInputError(f"none of the {len(self)} tokens is packed yet; read them with `states`")
        settings, pages = self.settings, self.pages.share()
        return PackedView(
            sinks=self.sinks,
            packed=pages.segment(
                (settings.key_codec, self.key_transform or ChannelTransform()),
                (settings.value_codec, self.value_transform or ChannelTransform()),
                None if self.heads is None else self.heads.span(0, self.packed),
            ),
            recent=self.recent,
            tokens=len(self),
            dtype=self.dtype,
            heads=self.heads,
            coarse=None if self.coarse is None else self.coarse.segment(),
            held=(pages, self.coarse),
        )

    def dense_tensors(self) -> list[torch.Tensor]:
        """The tensors kept in 16 bits (or the model's dtype): sinks and recent tokens."""
        return [t for segment in (self.sinks, self.recent) for t in (segment.keys, segment.values)]

    def packed_tensors(self) -> list[torch.Tensor]:
        """The planes of keys and values, room to grow included."""
        coarse = [] if self.coarse is None else self.coarse.planes()
        return self.key_pages.tensors + self.value_pages.tensors + coarse

    def metadata_tensors(self) -> list[torch.Tensor]:
        """The channel transforms, the query moment that the first is made of, page tables and head counts."""
        transforms = [t for t in (self.key_transform, self.value_transform) if t is not None]
        tensors = [tensor for transform in transforms for tensor in transform.tensors().values()]
        tensors += [] if self.coarse is None else self.coarse.transforms()
        tensors += self.pages.metadata() + ([] if self.heads is None else self.heads.tensors())
        return tensors if self.query_moment is None else [*tensors, self.query_moment]
