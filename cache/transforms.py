"""The channel transforms of a layer: what its settings ask for, taken from its tokens."""

import torch

from quantpress.cache.settings import LayerSettings
from quantpress.kernels.attend import DenseSegment
from quantpress.quantization.transform import ChannelTransform, key_statistics, value_statistics


def transforms_of(
    settings: LayerSettings,
    basis: DenseSegment,
    query_moment: torch.Tensor | None,
    in_use: torch.Tensor | None = None,
) -> tuple[ChannelTransform, ChannelTransform]:
    """Transforms for keys and values.

    Args:
        settings: codecs, and whether to take the mean key off and to balance.
        basis: T tokens.
        query_moment: [B, Hkv, D] mean square of the queries, or None.
        in_use: [B, Hkv, T] bool, which of the tokens count; None: all.

    Raises:
        NonFiniteError: they hold NaN or infinity.
    """
    key_transform, value_transform = ChannelTransform(), ChannelTransform()
    if settings.key_codec.wants_statistics:
        key_transform = key_statistics(
            basis.keys,
            query_moment,
            settings.key_codec.groups,
            mean=settings.mean_key,
            balance=settings.balance,
            in_use=in_use,
        )
    if settings.value_codec.wants_statistics:
        value_transform = value_statistics(basis.values, settings.value_codec.groups, in_use)
    return key_transform, value_transform
