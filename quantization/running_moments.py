"""Mean and energy of every channel, updated as vectors arrive, to find the channels that stand out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantpress.errors import EmptyContextError, InvalidInputError
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.moments import finite
from quantpress.quantization.transform import ChannelTransform, channel_order


class RunningMoments:
    """Moments of all vectors seen so far, in float64; no vector is kept.

    Args:
        head_dim: dimension D of the vectors.
        heads: how many heads have moments of their own; None: all vectors are of one kind.

    Attributes:
        count: vectors seen, of each head.

    Source: pairwise update of mean and squared deviations, Chan, Golub and LeVeque 1983.

    >>> moments = RunningMoments(4)
    >>> for _ in range(10):
    ...     moments.update(torch.randn(100, 4) * torch.tensor([1.0, 9.0, 1.0, 4.0]))
    >>> moments.order()[:2].tolist()
    [1, 3]
    """

    def __init__(self, head_dim: int, heads: int | None = None) -> None:
        self.head_dim = head_dim
        self.count = 0
        shape = (head_dim,) if heads is None else (heads, head_dim)
        self._mean = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self._deviation = torch.zeros_like(self._mean)

    def update(self, x: Tensor) -> None:
        """Add vectors x [..., D] floating; with heads [heads, ..., D].

        Raises:
            InvalidInputError: x has another D or number of heads, or is not floating.
            NonFiniteError: x holds NaN or infinity; the moments are unchanged.
        """
        by_head = self._mean.shape[:-1]
        fits = x.dim() > len(by_head) and x.shape[: len(by_head)] == by_head
        if not fits or x.shape[-1] != self.head_dim or not x.is_floating_point():
            wanted = ", ".join(map(str, (*by_head, "...", self.head_dim)))
            raise InvalidInputError(f"vectors must be floating [{wanted}], got {x.dtype} {tuple(x.shape)}")
        vectors = finite(x.detach(), "vectors").reshape(*by_head, -1, self.head_dim).double()
        added = vectors.shape[-2]
        if added == 0:
            return
        mean = vectors.mean(-2)
        deviation = (vectors - mean.unsqueeze(-2)).square().sum(-2).cpu()
        step, total = mean.cpu() - self._mean, self.count + added
        self._deviation += deviation + step.square() * (self.count * added / total)
        self._mean += step * (added / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """E[x_j], [D] or [heads, D] float64."""
        return self._mean.clone()

    @property
    def variance(self) -> Tensor:
        """E[(x_j - E[x_j])^2], [D] or [heads, D] float64."""
        return self._deviation / max(1, self.count)

    @property
    def energy(self) -> Tensor:
        """E[x_j^2], [D] or [heads, D] float64."""
        return self.variance + self._mean.square()

    def order(self, mean: bool = False) -> Tensor:
        """Channels by descending energy, [D] or [heads, D] int16; with `mean`, by descending variance.

        Raises:
            EmptyContextError: no vector was seen.
        """
        if self.count == 0:
            raise EmptyContextError("no vector was seen yet, so no channel stands out; call update first")
        return channel_order(self.variance if mean else self.energy)

    def transform(self, groups: Sequence[ChannelGroup], mean: bool = False) -> ChannelTransform:
        """A transform for `TurboQuantCodec.encode`: B = 1, and Hkv = 1 where all vectors are of one kind.

        Args:
            groups: channel groups of the codec; the first group gets the channels with the most energy.
            mean: whether the transform takes off the mean, too.

        Raises:
            EmptyContextError: no vector was seen.
        """
        shape = (1, -1, self.head_dim)
        order = self.order(mean).view(shape) if len(groups) > 1 else None
        return ChannelTransform(mean=self._mean.float().view(shape) if mean else None, order=order)
