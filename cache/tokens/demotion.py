"""Mixed precision instead of deletion: the less important tokens of a context in pages of fewer bits.

They are stored right behind the sinks, in the order of the text; attention does not mind the order of tokens
that every later query sees. They never change, and nothing is put behind them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.head_pages import EvenPages
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.cache.tokens.segments import take
from quantpress.cache.transforms import transforms_of
from quantpress.codecs.page_codec import PageCodec
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform


@dataclass(frozen=True, eq=False)
class Demotion:
    """Which tokens of a prefill fall to fewer bits, and to how many.

    Args:
        scores: [B, Hkv, T] floating; those with the lowest fall. Sinks and recent tokens do not.
        tokens: how many of each head, rounded down to whole pages and to what lies between the windows.
        key_codec: packs their keys.
        value_codec: packs their values.
    """

    scores: torch.Tensor
    tokens: int
    key_codec: PageCodec
    value_codec: PageCodec


@dataclass(frozen=True, eq=False)
class CoarsePages:
    """Pages that were packed once, by codecs of their own.

    Args:
        pages: as many in every head.
        key_codec, value_codec: what packed them.
        key_transform, value_transform: what was done to channels before.
    """

    pages: EvenPages
    key_codec: PageCodec
    value_codec: PageCodec
    key_transform: ChannelTransform
    value_transform: ChannelTransform

    @classmethod
    def pack(
        cls, settings: LayerSettings, tokens: DenseSegment, query_moment: torch.Tensor | None
    ) -> "CoarsePages":
        """Pack a whole number of pages with the codecs of `settings`."""
        transforms = transforms_of(settings, tokens, query_moment)
        pages = EvenPages()
        pages.append(
            settings.key_codec.encode(tokens.keys, transforms[0]),
            settings.value_codec.encode(tokens.values, transforms[1]),
        )
        return cls(pages, settings.key_codec, settings.value_codec, *transforms)

    @property
    def tokens(self) -> int:
        """Tokens of each head."""
        return self.pages.pages * PAGE_TOKENS

    def check_whole(self, slots: int, sinks: int) -> None:
        """Check that a layer of so many sinks is not cut into these pages.

        Raises:
            InvalidInputError: it is to keep fewer tokens than sinks and these pages hold.
        """
        if slots < sinks + self.tokens:
            raise InvalidInputError(
                f"the first {slots} tokens cannot be told from later ones: {self.tokens} are packed in fewer "
                f"bits; cut such a layer to {sinks + self.tokens} tokens or more, or to none"
            )

    def segment(self) -> PackedSegment:
        """What attention reads."""
        sides = (self.key_codec, self.key_transform), (self.value_codec, self.value_transform)
        return self.pages.segment(*sides, None)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CoarsePages":
        """The same with every tensor moved, copied or indexed in the batch."""
        transforms = (part.map(change) for part in (self.key_transform, self.value_transform))
        return CoarsePages(self.pages.map(change), self.key_codec, self.value_codec, *transforms)

    def planes(self) -> list[torch.Tensor]:
        """The packed tensors."""
        return self.pages.keys.tensors + self.pages.values.tensors

    def transforms(self) -> list[torch.Tensor]:
        """The tensors of both transforms."""
        return [t for part in (self.key_transform, self.value_transform) for t in part.tensors().values()]


def pack_with_demotion(
    settings: LayerSettings,
    keys: torch.Tensor,
    values: torch.Tensor,
    demotion: Demotion,
    query_moment: torch.Tensor | None = None,
) -> PackedTokens:
    """Pack a prefill in two precisions. Both have channel transforms of their own.

    Args:
        settings: codecs of the better tokens, and windows.
        keys: [B, Hkv, T, D].
        values: [B, Hkv, T, Dv].
        demotion: what falls.
        query_moment: as for `PackedLayer.from_states`.

    Raises:
        InvalidInputError: the scores have another shape.
        NonFiniteError: keys or values hold NaN or infinity.
    """
    if demotion.scores.shape != keys.shape[:3]:
        raise InvalidInputError(
            f"scores of {tuple(demotion.scores.shape)} do not fit keys of {tuple(keys.shape)}; "
            f"give [B, Hkv, T] = {tuple(keys.shape[:3])}"
        )
    low, high = _places(settings, demotion)
    tokens = PackedTokens(settings, take(keys, high), take(values, high))
    tokens.query_moment = query_moment
    if low.shape[2]:
        coarse = replace(settings, key_codec=demotion.key_codec, value_codec=demotion.value_codec)
        fallen = DenseSegment(take(keys, low), take(values, low))
        tokens.coarse = CoarsePages.pack(coarse, fallen, query_moment)
    tokens.flush()
    tokens.own()
    return tokens


def _places(settings: LayerSettings, demotion: Demotion) -> tuple[torch.Tensor, torch.Tensor]:
    """Places [B, Hkv, L] and [B, Hkv, T - L] int64 of the tokens that fall and of the others, in order."""
    count = demotion.scores.shape[2]
    first, last = settings.sink_tokens, max(settings.sink_tokens, count - settings.recent_tokens)
    middle = demotion.scores[:, :, first:last]
    fall = min(demotion.tokens, middle.shape[2]) // PAGE_TOKENS * PAGE_TOKENS
    falls = torch.zeros(demotion.scores.shape, dtype=torch.uint8, device=demotion.scores.device)
    places = middle.topk(fall, dim=-1, largest=False).indices + first
    order = falls.scatter_(2, places, 1).argsort(dim=-1, stable=True)
    return order[:, :, count - fall :], order[:, :, : count - fall]
