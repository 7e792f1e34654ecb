"""What makes keys hard to pack: a mean that all keys of a head share, and channels that stand out."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from quantpress.cache import host
from quantpress.errors import InvalidInputError
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.rollback import model_rollback

OUTLIER = 5.0
"""A channel stands out when its energy is more than this many times the mean of its head."""

SINK_TOKENS = 4
"""First tokens, which are left out: they stay in 16 bits, and their keys are unlike all others."""


@dataclass(frozen=True)
class KeyStatistics:
    """The keys of one layer, as they are cached; means over its KV heads.

    Args:
        mean_energy: share of the keys' energy that lies in their mean, |E k|^2 / E|k|^2, 0 to 1.
        worst_mean_energy: the largest such share of one head.
        outliers: number of channels of a head that stand out.
        centred_outliers: number of channels that still stand out once the mean is subtracted.
        channels: number of channels of a head.
    """

    mean_energy: float
    worst_mean_energy: float
    outliers: float
    centred_outliers: float
    channels: int

    @classmethod
    def of(cls, keys: torch.Tensor, skip: int = SINK_TOKENS) -> "KeyStatistics":
        """Measure keys.

        Args:
            keys: [B, Hkv, T, D] any float dtype, post-RoPE.
            skip: number of first tokens to leave out.

        Raises:
            InvalidInputError: fewer than two tokens are left.
        """
        if keys.shape[2] < skip + 2:
            raise InvalidInputError(
                f"{keys.shape[2]} tokens are too few to measure; give at least {skip + 2}"
            )
        rest = keys[:, :, skip:].double()
        energy = rest.square().mean(2)  # [B, Hkv, D]
        mean = rest.mean(2).square()
        shares = mean.sum(-1) / energy.sum(-1)
        return cls(
            mean_energy=float(shares.mean()),
            worst_mean_energy=float(shares.max()),
            outliers=_standing_out(energy),
            centred_outliers=_standing_out(energy - mean),
            channels=keys.shape[-1],
        )


def key_statistics(model: PreTrainedModel, input_ids: torch.Tensor) -> dict[int, KeyStatistics]:
    """Statistics of each layer that caches keys of four dimensions, by layer index.

    Args:
        model: decoder-only.
        input_ids: [1, T] int64, read without a press.
    """
    cache = host.empty_cache(model)
    with torch.no_grad(), model_rollback(model):
        read_context(model, input_ids, cache)
    found = {}
    for index, layer in enumerate(cache.layers):
        states = getattr(layer, "keys", None)
        if isinstance(states, torch.Tensor) and states.dim() == 4 and states.numel():
            found[index] = KeyStatistics.of(states)
    return found


def _standing_out(energy: torch.Tensor) -> float:
    """Mean number of channels per head with much energy, from [B, Hkv, D]."""
    return float((energy > OUTLIER * energy.mean(-1, keepdim=True)).sum(-1).double().mean())
