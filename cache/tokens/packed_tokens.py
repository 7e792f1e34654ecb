"""`PackedTokens`: the keys and values of one layer, most of them in packed pages.

The tokens, in order::

    [ sinks: first `sink_tokens`, 16 bits | whole pages of 128 tokens, packed | recent, 16 bits ]

New tokens join the recent ones. When there are `recent_tokens` + 128 of them, the oldest 128 become a page.
The channel transforms (mean key, balanced channels) are computed once, from the first tokens that are packed.
They never change, because pages already packed depend on them.

After a head-wise eviction, heads keep different numbers of tokens (`HeadLengths`, `RaggedPages`); see
`quantpress.cache.tokens.eviction`. Tokens demoted to fewer bits have pages of their own (`DemotedPages`)
between the sinks and the other pages.
"""

import copy
from collections.abc import Callable, Mapping

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.demotion import DemotedPages, Demotion
from quantpress.cache.tokens.head_lengths import HeadLengths
from quantpress.cache.tokens.pages import PageStore, RectangularPages, Span
from quantpress.cache.tokens.ragged_pages import RaggedPages
from quantpress.cache.tokens.segments import after, compact, decode_segment, first, join
from quantpress.cache.tokens.view import PackedView
from quantpress.codecs.protocol import Planes
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform


class PackedTokens:
    """Sinks, pages and recent tokens of one layer.

    Args:
        settings: how the tokens are stored.
        keys: [B, Hkv, T, D], the first tokens; T may be 0. They set dtype, device and shapes.
        values: [B, Hkv, T, Dv].

    Attributes:
        sinks: the first tokens, in 16 bits.
        pages: the packed tokens.
        heads: how many tokens each head keeps; None: all.
        demoted: pages of fewer bits behind the sinks, or None.
        query_moment: [B, Hkv, D] mean square of the queries, if known before the first page is packed.
        key_transform: applied to the channels of keys before packing; None until the first page.
        value_transform: the same for values.
    """

    def __init__(self, settings: LayerSettings, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.settings = settings
        self.dtype = keys.dtype
        batch, heads, _, dim = keys.shape
        empty = DenseSegment(
            keys.new_empty(batch, heads, 0, dim), values.new_empty(batch, heads, 0, values.shape[-1])
        )
        self.sinks, self._recent = empty, empty
        self.pages: RectangularPages | RaggedPages = RectangularPages()
        self.heads: HeadLengths | None = None
        self.demoted: DemotedPages | None = None
        self.key_transform: ChannelTransform | None = None
        self.value_transform: ChannelTransform | None = None
        self.query_moment: torch.Tensor | None = None
        self.append(keys, values)

    @classmethod
    def from_prefill(
        cls,
        settings: LayerSettings,
        keys: torch.Tensor,
        values: torch.Tensor,
        query_moment: torch.Tensor | None = None,
        demotion: Demotion | None = None,
    ) -> "PackedTokens":
        """Pack the tokens of a prefill. The result shares no storage with `keys` and `values`.

        Args:
            settings: how the tokens are stored.
            keys: [B, Hkv, T, D].
            values: [B, Hkv, T, Dv].
            query_moment: [B, Hkv, D] mean square of the queries, to balance channels; or None.
            demotion: the tokens to pack in fewer bits; None: none.

        Raises:
            InvalidInputError: the scores of the demotion have the wrong shape.
            NonFiniteError: keys or values contain NaN or infinity.
        """
        prefill, lower = DenseSegment(keys, values), None
        if demotion is not None:
            lower, prefill = demotion.split(prefill, settings)
        tokens = cls(settings, prefill.keys, prefill.values)
        tokens.query_moment = query_moment
        if demotion is not None and lower is not None and lower.tokens:
            tokens.demoted = DemotedPages.pack(settings, demotion, lower, query_moment)
        tokens.flush()
        tokens.own()
        return tokens

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
        """Tokens that fit into the pages, except demoted ones; all in use unless `heads` is set."""
        return self.pages.pages * PAGE_TOKENS

    @property
    def packed_tokens(self) -> int:
        """Packed tokens of the head that has most of them, demoted ones included."""
        unused = 0 if self.heads is None else min(self.packed, self.heads.least_padding)
        return self.demoted_tokens + self.packed - unused

    @property
    def stored_length(self) -> int:
        """Tokens of each head that there is storage for, in use or not."""
        return self.sinks.tokens + self.demoted_tokens + self.packed + self.recent.tokens

    @property
    def demoted_tokens(self) -> int:
        """Tokens in pages of fewer bits."""
        return 0 if self.demoted is None else self.demoted.tokens

    @property
    def readable(self) -> bool:
        """Whether attention reads a `view` instead of plain tensors."""
        return bool(self.packed) or self.heads is not None or self.demoted is not None

    def __len__(self) -> int:
        """Slots: tokens given, less those that were evicted from all heads alike."""
        return self.stored_length + (0 if self.heads is None else self.heads.evicted)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append tokens in 16 bits: keys [B, Hkv, N, D], values [B, Hkv, N, Dv]."""
        new = DenseSegment(keys, values)
        if not self.readable and not self.recent.tokens:
            missing = min(self.settings.sink_tokens - self.sinks.tokens, new.tokens)
            if missing > 0:
                self.sinks, new = join(self.sinks, first(new, missing)), after(new, missing)
        self._recent = join(self._recent, new)

    def flush(self) -> bool:
        """Pack the oldest recent tokens, as many as fill whole pages.

        Returns:
            Whether anything was packed.

        Raises:
            NonFiniteError: the tokens contain NaN or infinity; nothing was changed.
        """
        tokens = max(0, self.recent.tokens - self.settings.recent_tokens) // PAGE_TOKENS * PAGE_TOKENS
        if tokens == 0:
            return False
        self.pack(first(self.recent, tokens))
        self._recent = after(self._recent, tokens)
        self.own()
        return True

    def reserve(self, tokens: int) -> None:
        """Allocate capacity for the pages of `tokens` more tokens; does nothing before the first page."""
        pages = (self.packed + self.recent.tokens + tokens) // PAGE_TOKENS
        self.pages.reserve(pages)

    def pack(self, tokens: DenseSegment) -> None:
        """Append tokens, a whole number of pages, to the pages; raises as `encode` does."""
        in_use = None if self.heads is None else self.heads.in_use(self.packed, self.packed + tokens.tokens)
        self.pages.append(*self.encode(tokens, tokens, in_use))

    def encode(
        self, tokens: DenseSegment, sample: DenseSegment, in_use: torch.Tensor | None
    ) -> tuple[Planes, Planes]:
        """Encode a whole number of pages; the first call computes the channel transforms.

        Args:
            tokens: P * 128 tokens.
            sample: T tokens to compute the channel transforms from, if there are none yet.
            in_use: [B, Hkv, T] bool, True for the tokens of the sample that count; None: all.

        Returns:
            Planes [B, Hkv, P, ...] of keys and of values.

        Raises:
            NonFiniteError: the tokens contain NaN or infinity; nothing was changed.
        """
        with torch.no_grad():
            key_transform, value_transform = self.key_transform, self.value_transform
            if key_transform is None or value_transform is None:
                key_transform, value_transform = self.settings.channel_transforms(
                    sample, self.query_moment, in_use
                )
            key_planes = self.settings.key_codec.encode(tokens.keys, key_transform)
            value_planes = self.settings.value_codec.encode(tokens.values, value_transform)
        self.key_transform, self.value_transform, self.query_moment = key_transform, value_transform, None
        return key_planes, value_planes

    def narrow(self, planes: Mapping[int, torch.Tensor]) -> None:
        """Replace planes that an encoding of these tokens made in float32 by the same in float16.

        Args:
            planes: what replaces them, by their ids, for this layer and for others. Planes that were moved
                since stay in float32.
        """
        for pages in (self.pages, *(() if self.demoted is None else (self.demoted.pages,))):
            pages.keys.narrow(planes)
            pages.values.narrow(planes)

    def crop(self, slots: int) -> None:
        """Keep the first `slots` tokens. Tokens left over from a page that is cut are decoded.

        Packed again, these give the same codes, except for about one vector in some thousands: one with a
        coordinate far beyond the last level, which is shorter in code space than its scale says.

        Raises:
            InvalidInputError: the crop ends among tokens that single heads have evicted, or among demoted
                tokens.
        """
        stored = slots
        if self.heads is not None and slots:
            self.heads.check_whole(slots)
            stored -= self.heads.evicted
        if self.demoted is not None and slots:
            self.demoted.check_whole(slots, self.sinks.tokens)
        behind = stored - self.sinks.tokens - self.demoted_tokens
        if behind >= self.packed:
            self._recent = first(self._recent, behind - self.packed)
        elif behind >= 0:
            whole, rest = divmod(behind, PAGE_TOKENS)
            cut = decode_segment(self.view().pages(whole, whole + 1), self.dtype)
            self._recent = first(cut, rest)
            self.pages.crop(whole)
        else:
            self.sinks, self._recent = first(self.sinks, stored), first(self._recent, 0)
            self.pages.crop(0)
        if slots == 0:  # no page depends on the transforms any more
            self.key_transform = self.value_transform = None
            self.pages, self.heads, self.demoted = RectangularPages(), None, None
        self.own()

    def replace_dense(self, sinks: DenseSegment, recent: DenseSegment) -> None:
        """Replace the tokens kept in 16 bits."""
        self.sinks, self._recent = sinks, recent
        self.own()

    def take_recent(self) -> DenseSegment:
        """Hand the recent tokens over; none are left here."""
        recent, self._recent = self._recent, first(self._recent, 0)
        return recent

    def own(self) -> None:
        """Copy 16-bit tokens that are slices of larger storages, so that these are freed."""
        self.sinks, self._recent = compact(self.sinks), compact(self._recent)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change` (move or copy) to every tensor."""
        self._map_unpaged(change)
        self.pages = self.pages.map(change)

    def select(self, entries: torch.Tensor) -> None:
        """Keep batch entries [B'] int64, any of them more than once."""
        self._map_unpaged(lambda tensor: tensor.index_select(0, entries.to(tensor.device)))
        self.pages = self.pages.select(entries.to(self.sinks.device))

    def _map_unpaged(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change` to all tensors but those of `pages`; each has the batch first."""
        self.sinks = DenseSegment(change(self.sinks.keys), change(self.sinks.values))
        self._recent = DenseSegment(change(self._recent.keys), change(self._recent.values))
        if self.heads is not None:
            self.heads = self.heads.map(change)
        if self.demoted is not None:
            self.demoted = self.demoted.map(change)
        if self.query_moment is not None:
            self.query_moment = change(self.query_moment)
        if self.key_transform is not None and self.value_transform is not None:
            self.key_transform = self.key_transform.map(change)
            self.value_transform = self.value_transform.map(change)

    def share(self) -> "PackedTokens":
        """The same tokens over the same memory. Changes to one of the two do not show in the other."""
        other = copy.copy(self)
        other.pages = self.pages.share()
        return other

    def view(self) -> PackedView:
        """The tokens as they are now. Later changes do not show in the view.

        Raises:
            InvalidInputError: no token is packed yet.
        """
        if not self.readable:
            raise InvalidInputError(
                f"none of the {len(self)} tokens is packed yet; read them from `sinks` and `recent`"
            )
        pages = self.pages.share()
        return PackedView(
            sinks=self.sinks,
            packed=self.packed_segment(None if self.heads is None else self.heads.span(0, self.packed)),
            recent=self.recent,
            tokens=len(self),
            dtype=self.dtype,
            heads=self.heads,
            demoted=None if self.demoted is None else self.demoted.segment(),
            owners=(pages, self.demoted),
        )

    def packed_segment(self, span: Span | None, to_capacity: bool = False) -> PackedSegment:
        """The packed pages as attention reads them; see `RectangularPages.segment`."""
        keys = self.settings.key_codec, self.key_transform or ChannelTransform()
        values = self.settings.value_codec, self.value_transform or ChannelTransform()
        return self.pages.segment(keys, values, span, to_capacity)

    def dense_tensors(self) -> list[torch.Tensor]:
        """The tensors of sinks and recent tokens, in 16 bits (in the model's dtype)."""
        return [t for segment in (self.sinks, self.recent) for t in (segment.keys, segment.values)]

    def packed_tensors(self) -> list[torch.Tensor]:
        """The planes of keys and values, spare capacity included."""
        demoted = [] if self.demoted is None else self.demoted.planes()
        return self.key_pages.tensors + self.value_pages.tensors + demoted

    def metadata_tensors(self) -> list[torch.Tensor]:
        """Channel transforms, the query moment kept for them, page tables and lengths of heads."""
        transforms = [t for t in (self.key_transform, self.value_transform) if t is not None]
        tensors = [tensor for transform in transforms for tensor in transform.tensors().values()]
        tensors += [] if self.demoted is None else self.demoted.transforms()
        tensors += self.pages.metadata() + ([] if self.heads is None else self.heads.tensors())
        return tensors if self.query_moment is None else [*tensors, self.query_moment]
