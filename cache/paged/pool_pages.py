"""Pages of a pool on their way: from windows of 16-bit tokens into the planes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.codecs.page_codec import Planes
from quantpress.kernels.attend import DenseSegment
from quantpress.quantization.transform import ChannelTransform


@dataclass(frozen=True)
class Packing:
    """The oldest tokens in the window of one slot that are to become pages.

    Args:
        slot: whose.
        blocks: where the pages go, one block each, in order.
        tokens: tokens in the window now.
        first: the sequence has no page yet.
    """

    slot: int
    blocks: Sequence[int]
    tokens: int
    first: bool


@dataclass(frozen=True)
class Pages:
    """Encoded pages on their way into the planes: of keys and values, [A, Hkv, P, ...].

    Args:
        layers: A layers.
        blocks: A times the blocks of P pages.
        planes: of keys and of values.
        made: slot and transforms [1, Hkv, D], where these pages are the first of their slot.
    """

    layers: Sequence[int]
    blocks: Sequence[Sequence[int]]
    planes: tuple[Planes, Planes]
    made: tuple[int, tuple[ChannelTransform, ChannelTransform]] | None = None


def first_pages(
    settings: LayerSettings,
    layer: int,
    slot: int,
    blocks: Sequence[int],
    keys: torch.Tensor,
    values: torch.Tensor,
    query_moment: torch.Tensor | None,
) -> Pages:
    """The first pages of a slot in one layer, with transforms taken from what they hold.

    Args:
        settings: codecs, and which statistics to take.
        layer: which layer.
        slot: whose.
        blocks: P blocks for them.
        keys: [Hkv, P * 128, D].
        values: [Hkv, P * 128, Dv].
        query_moment: [Hkv, D] for the balance of channels, or None.

    Raises:
        NonFiniteError: keys, values or the moment hold NaN or infinity.
    """
    keys, values = keys.unsqueeze(0), values.unsqueeze(0)
    moment = None if query_moment is None else query_moment.unsqueeze(0)
    key_transform, value_transform = settings.channel_transforms(DenseSegment(keys, values), moment)
    planes = (
        settings.key_codec.encode(keys, key_transform),
        settings.value_codec.encode(values, value_transform),
    )
    return Pages([layer], [blocks], planes, (slot, (key_transform, value_transform)))
