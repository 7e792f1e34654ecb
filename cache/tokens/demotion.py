"""Mixed precision instead of deletion: the less important tokens of a context in pages of fewer bits.

Demoted tokens are stored right behind the sinks, in the order of the text. Attention does not depend on the
order of tokens that every later query sees. The pages never change, and no page is appended to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.pages import RectangularPages
from quantpress.cache.tokens.segments import gather_tokens
from quantpress.codecs.protocol import PageCodec
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform


@dataclass(frozen=True, eq=False)
class Demotion:
    """Which tokens of a prefill are packed in fewer bits, and by which codecs.

    Args:
        scores: [B, Hkv, T] floating; the tokens with the lowest scores are demoted. Sinks and recent tokens
            never are.
        tokens: tokens to demote in each head, rounded down to whole pages and to the number of tokens between
            the sinks and the recent ones.
        key_codec: packs the demoted keys.
        value_codec: packs the demoted values.
    """

    scores: torch.Tensor
    tokens: int
    key_codec: PageCodec
    value_codec: PageCodec

    def split(self, prefill: DenseSegment, settings: LayerSettings) -> tuple[DenseSegment, DenseSegment]:
        """The demoted tokens of a prefill of T tokens, and the others, both in the order of the text.

        Args:
            prefill: T tokens.
            settings: numbers of sinks and recent tokens of the layer.

        Raises:
            InvalidInputError: the shape of `scores` does not fit the keys.
        """
        if self.scores.shape != prefill.keys.shape[:3]:
            raise InvalidInputError(
                f"scores of {tuple(self.scores.shape)} do not fit keys of {tuple(prefill.keys.shape)}; "
                f"give [B, Hkv, T] = {tuple(prefill.keys.shape[:3])}"
            )
        count = prefill.tokens
        first, last = settings.sink_tokens, max(settings.sink_tokens, count - settings.recent_tokens)
        middle = self.scores[:, :, first:last]
        demoted = min(self.tokens, middle.shape[2]) // PAGE_TOKENS * PAGE_TOKENS
        is_demoted = torch.zeros(self.scores.shape, dtype=torch.uint8, device=self.scores.device)
        slots = middle.topk(demoted, dim=-1, largest=False).indices + first
        order = is_demoted.scatter_(2, slots, 1).argsort(dim=-1, stable=True)
        demoted_tokens, others = (
            DenseSegment(gather_tokens(prefill.keys, part), gather_tokens(prefill.values, part))
            for part in (order[:, :, count - demoted :], order[:, :, : count - demoted])
        )
        return demoted_tokens, others


@dataclass(frozen=True, eq=False)
class DemotedPages:
    """Pages of demoted tokens, with codecs and channel transforms of their own.

    Args:
        pages: the pages, the same number in every head.
        key_codec: packed the keys.
        value_codec: packed the values.
        key_transform: applied to the keys before packing.
        value_transform: applied to the values before packing.
    """

    pages: RectangularPages
    key_codec: PageCodec
    value_codec: PageCodec
    key_transform: ChannelTransform
    value_transform: ChannelTransform

    @classmethod
    def pack(
        cls,
        settings: LayerSettings,
        demotion: Demotion,
        tokens: DenseSegment,
        query_moment: torch.Tensor | None,
    ) -> "DemotedPages":
        """Pack tokens with the codecs of a demotion.

        Args:
            settings: which statistics to take.
            demotion: the codecs.
            tokens: demoted tokens, a whole number of pages.
            query_moment: [B, Hkv, D] mean square of the queries, or None.

        Raises:
            NonFiniteError: the tokens contain NaN or infinity.
        """
        keys, values = demotion.key_codec, demotion.value_codec
        lower = replace(settings, key_codec=keys, value_codec=values)
        transforms = lower.channel_transforms(tokens, query_moment)
        pages = RectangularPages()
        pages.append(keys.encode(tokens.keys, transforms[0]), values.encode(tokens.values, transforms[1]))
        return cls(pages, keys, values, *transforms)

    @property
    def tokens(self) -> int:
        """Tokens of each head."""
        return self.pages.pages * PAGE_TOKENS

    def check_whole(self, slots: int, sinks: int) -> None:
        """Check that a layer cropped to `slots` tokens, the first `sinks` of them sinks, keeps these pages.

        Raises:
            InvalidInputError: the layer would keep fewer tokens than its sinks and these pages hold.
        """
        if slots < sinks + self.tokens:
            raise InvalidInputError(
                f"the first {slots} tokens cannot be told from later ones: {self.tokens} are packed in fewer "
                f"bits; cut such a layer to {sinks + self.tokens} tokens or more, or to none"
            )

    def segment(self) -> PackedSegment:
        """The pages as attention reads them."""
        sides = (self.key_codec, self.key_transform), (self.value_codec, self.value_transform)
        return self.pages.segment(*sides, None)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "DemotedPages":
        """The same pages with every tensor moved, copied or indexed in the batch."""
        transforms = (part.map(change) for part in (self.key_transform, self.value_transform))
        return DemotedPages(self.pages.map(change), self.key_codec, self.value_codec, *transforms)

    def planes(self) -> list[torch.Tensor]:
        """The packed tensors."""
        return self.pages.keys.tensors + self.pages.values.tensors

    def transforms(self) -> list[torch.Tensor]:
        """The tensors of both transforms."""
        return [t for part in (self.key_transform, self.value_transform) for t in part.tensors().values()]
