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
from quantpress.cache.segments import after, compact, first, join, take
from quantpress.cache.settings import LayerSettings
from quantpress.cache.view import PackedView, decode_segment
from quantpress.codecs.transform import ChannelTransform, key_statistics, value_statistics
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.page_codec import PageCodec


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

    def keep(self, kept: torch.Tensor) -> None:
        """Keep selected tokens, in the order in which they are stored; codes and scales move as they are.

        Heads may keep different numbers of sinks, packed and recent tokens. Pages hold what is packed in all
        of them, as far as whole pages go; other packed tokens are decoded, and packed again give the same
        codes, as after `crop`.

        Args:
            kept: [B, Hkv, K] int64, places among the tokens, distinct within a head, in any order.

        Raises:
            InvalidInputError: wrong dtype or shape, a place twice, or one where no token is.
        """
        kept = self._checked_places(kept)
        sinks, dense_from = self.sinks.tokens, self.sinks.tokens + self.packed
        start = int((kept < sinks).sum(-1).amax()) if kept.numel() else 0
        stop = int((kept < dense_from).sum(-1).amin()) if kept.numel() else 0
        end = start + max(0, stop - start) // PAGE_TOKENS * PAGE_TOKENS
        front, back = self._taken(kept[..., :start]), self._taken(kept[..., end:])
        inside = kept[..., start:end] - sinks
        self.key_pages = _gathered(self.settings.key_codec, self.key_pages, inside)
        self.value_pages = _gathered(self.settings.value_codec, self.value_pages, inside)
        self.sinks, self._recent = front, back
        self.own()

    def _checked_places(self, kept: torch.Tensor) -> torch.Tensor:
        heads = self.sinks.keys.shape[:2]
        if kept.dtype != torch.int64 or kept.dim() != 3 or kept.shape[:2] != heads:
            wanted = f"int64 [{heads[0]}, {heads[1]}, K]"
            raise InvalidInputError(f"tokens to keep must be {wanted}, got {kept.dtype} {tuple(kept.shape)}")
        ordered = kept.sort(dim=-1).values
        inside = bool(((ordered >= 0) & (ordered < len(self))).all())
        if not inside or not bool((ordered.diff(dim=-1) > 0).all()):
            raise InvalidInputError(f"tokens to keep must be distinct places from 0 to {len(self) - 1}")
        return ordered

    def _taken(self, places: torch.Tensor) -> DenseSegment:
        """The tokens at places [B, Hkv, N] in 16 bits; packed ones are decoded."""
        sinks, packed, tokens = self.sinks.tokens, self.packed, places.shape[2]
        is_packed = (places >= sinks) & (places < sinks + packed)
        inside = (places - sinks).clamp(0, max(0, packed - 1))
        dense, place = join(self.sinks, self._recent), torch.where(places < sinks, places, places - packed)
        taken = dense
        if dense.tokens:
            place = place.clamp(0, dense.tokens - 1)
            taken = DenseSegment(take(dense.keys, place), take(dense.values, place))
        if not tokens or not bool(is_packed.any()):
            return first(taken, tokens)
        inside = torch.nn.functional.pad(inside, (0, -tokens % PAGE_TOKENS))
        view = self.view().gather(inside)
        decoded = first(decode_segment(view, self.dtype), tokens)
        if not dense.tokens:
            return decoded
        mask = is_packed.unsqueeze(-1)
        return DenseSegment(
            torch.where(mask, decoded.keys, taken.keys), torch.where(mask, decoded.values, taken.values)
        )

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


def _gathered(codec: PageCodec, pages: PageStore, tokens: torch.Tensor) -> PageStore:
    """A new store of the tokens [B, Hkv, N], a whole number of pages; views of the old one stay."""
    return PageStore(codec.gather(pages.planes, tokens) if tokens.shape[2] else None)
