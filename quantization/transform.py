"""What is done to the channels of a head before they are rotated and coded.

Attention sees keys only through q.k, so the mean key may be subtracted (softmax ignores a shift that all
scores share), and a key's channels may be scaled if the query's are scaled back. Both are chosen for each KV
head so that the codec's error, which the rotation spreads evenly, falls on channels where queries are small:

    y = ((k - mu) * w)[order],   q.k = (q / w)[order].y + q.mu,   w_j = (E[q_j^2] / E[(k_j - mu_j)^2])^(1/4)

The weights minimise the expected score error: it is proportional to E|w (k - mu)|^2 * E|q / w|^2, which
Cauchy-Schwarz bounds from below by (sum_j sqrt(E[q_j^2] E[(k_j - mu_j)^2]))^2, reached by these w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.deferred import judge
from quantpress.errors import InvalidInputError
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.moments import finite, relative_moment, token_energy, token_mean
from quantpress.quantization.numerics import in_named_dtypes

DEFAULT_FLOOR = 0.05
"""Least second moment of a channel, relative to the mean over channels; 2 to 10 % measured the same."""

_BALANCE_EXPONENT = 0.25


@dataclass(frozen=True, eq=False)
class ChannelTransform:
    """An invertible map of the channels of each head; the identity where a part is None.

    Parts [1, Hkv, D] hold for every batch entry.

    Args:
        mean: mu, [B, Hkv, D] float32, or None for zero.
        weight: w, [B, Hkv, D] float32, positive, or None for one.
        order: [B, Hkv, D] int16, a permutation of 0 to D-1: channel i of the result is channel order[i] of x.
            None: the channels stay in order.

    Raises:
        InvalidInputError: the parts differ in shape or are not [B, Hkv, D].
    """

    mean: Tensor | None = None
    weight: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
        if len(set(shapes.values())) > 1 or any(len(shape) != 3 for shape in shapes.values()):
            raise InvalidInputError(
                f"the parts of a channel transform must share one shape [B, Hkv, D], got {shapes}"
            )

    def apply(self, x: Tensor) -> Tensor:
        """Prepare keys or values: y = ((x - mean) * weight)[order].

        Args:
            x: [B, Hkv, ..., D] floating, any number of middle dimensions.

        Returns:
            The same shape in float32.

        Raises:
            InvalidInputError: x's heads or channels are not the transform's; the methods below raise it, too.
        """
        y = self._checked(x)
        if self.mean is not None:
            y = y - _spread(self.mean, y)
        if self.weight is not None:
            y = y * _spread(self.weight, y)
        return y if self.order is None else _gather(y, self.order)

    def invert(self, y: Tensor) -> Tensor:
        """Undo `apply`: [B, Hkv, ..., D] floating -> the same shape in float32."""
        x = self._checked(y)
        if self.order is not None:
            x = _gather(x, self.order.long().argsort(-1))
        if self.weight is not None:
            x = x / _spread(self.weight, x)
        return x if self.mean is None else x + _spread(self.mean, x)

    def query(self, q: Tensor) -> Tensor:
        """Prepare queries, (q / weight)[order], so that q.x is query(q).apply(x) + bias(q).

        Args:
            q: [B, Hkv, ..., D] floating, the query heads of a KV head among the middle dimensions.

        Returns:
            The same shape in float32.
        """
        y = self._checked(q)
        if self.weight is not None:
            y = y / _spread(self.weight, y)
        return y if self.order is None else _gather(y, self.order)

    def bias(self, q: Tensor) -> Tensor:
        """Score of the mean key, q.mean: [B, Hkv, ..., D] floating -> [B, Hkv, ...] float32."""
        y = self._checked(q)
        if self.mean is None:
            return y.new_zeros(y.shape[:-1])
        return (y * _spread(self.mean, y)).sum(-1)

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are not None, by name."""
        parts = {"mean": self.mean, "weight": self.weight, "order": self.order}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def map(self, fn: Callable[[Tensor], Tensor]) -> ChannelTransform:
        """A new transform with `fn` applied to each part, for instance to move it to another device."""
        return ChannelTransform(**{name: fn(tensor) for name, tensor in self.tensors().items()})

    def entries(self, pick: Callable[[Tensor], Tensor]) -> ChannelTransform:
        """A new transform with the batch entries that `pick` takes out of parts [B, Hkv, D].

        Parts [1, Hkv, D], which hold for every entry, stay as they are.
        """
        return self.map(lambda part: part if part.shape[0] == 1 else pick(part))

    def expanded(self, batch: int) -> ChannelTransform:
        """A transform with parts [B, Hkv, D] for `batch` entries; views where they were [1, Hkv, D]."""
        return self.map(lambda part: part.expand(batch, -1, -1))

    def contiguous(self, batch: int) -> dict[str, Tensor]:
        """The parts that are not None, by name: [B, Hkv, D] for `batch` entries, contiguous."""
        return {
            name: (part if part.shape[0] == batch else part.expand(batch, -1, -1)).contiguous()
            for name, part in self.tensors().items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def check(self, x: Tensor) -> None:
        """Refuse x [B, Hkv, ..., D] whose heads or channels are not the transform's.

        Raises:
            InvalidInputError: they are not.
        """
        for name, part in self.tensors().items():
            fits = x.ndim >= 3 and x.shape[1] == part.shape[1] and x.shape[-1] == part.shape[-1]
            if not fits or part.shape[0] not in (1, x.shape[0]):
                raise InvalidInputError(
                    f"a tensor of shape {tuple(x.shape)} does not fit the transform's {name} of shape "
                    f"{tuple(part.shape)}; it must be [B, Hkv, ..., D] with the same B, Hkv and D, or any B "
                    "where the part has 1"
                )

    def _checked(self, x: Tensor) -> Tensor:
        self.check(x)
        return x.float()


@in_named_dtypes
def key_statistics(
    keys: Tensor,
    query_moment: Tensor | None,
    groups: Sequence[ChannelGroup],
    mean: bool = True,
    balance: bool = True,
    floor: float = DEFAULT_FLOOR,
    in_use: Tensor | None = None,
) -> ChannelTransform:
    """The transform of keys: subtract the mean key, balance channels against queries, outlier channels first.

    weight_j = (E[q_j^2] / E[(k_j - mu_j)^2])^(1/4), scaled so that its geometric mean over channels is 1, and
    rounded to bfloat16: tensor cores multiply keys by such weights without error.
    With several groups the channels are ordered by descending energy of the weighted, centred key.

    Args:
        keys: [B, Hkv, T, D] floating, after the rotary embedding. Sums are in float32.
        query_moment: E[q_j^2], [B, Hkv, D], over recent queries and the query heads of each KV head; None for
            no weight. The weight is 1 in heads where it is 0 in every channel.
        groups: channel groups of the codec.
        mean: whether to subtract the mean over tokens.
        balance: whether to weight channels; needs `query_moment`.
        floor: both moments are at least `floor` times their mean over channels, 0 < floor <= 1.
        in_use: [B, Hkv, T] bool, the tokens that count; None: all.

    Returns:
        mean and weight float32, order int16, each [B, Hkv, D] or None where not asked for.

    Raises:
        EmptyContextError: T is 0.
        NonFiniteError: keys or query_moment hold NaN or infinity.
        InvalidInputError: `query_moment` has the wrong shape or negative values, `keys` are not
            [B, Hkv, T, D], or `floor` is out of range.
    """
    if not 0 < floor <= 1:
        raise InvalidInputError(f"floor must lie in 0 < floor <= 1, got {floor!r}")
    centre = token_mean(keys, "keys", in_use) if mean else None
    energy = token_energy(keys, centre, "keys", in_use)
    return moment_statistics(centre, energy, query_moment if balance else None, groups, floor)


@in_named_dtypes
def moment_statistics(
    centre: Tensor | None,
    energy: Tensor,
    query_moment: Tensor | None,
    groups: Sequence[ChannelGroup],
    floor: float = DEFAULT_FLOOR,
) -> ChannelTransform:
    """The transform of `key_statistics` from moments of keys, which may be of more keys than fit in memory.

    Args:
        centre: E[k_j], [B, Hkv, D] float32; None: nothing is subtracted.
        energy: E[(k_j - centre_j)^2], [B, Hkv, D] float32.
        query_moment: E[q_j^2], [B, Hkv, D]; None for no weight.
        groups: channel groups of the codec.
        floor: as for `key_statistics`.

    Raises:
        NonFiniteError: query_moment holds NaN or infinity.
        InvalidInputError: `query_moment` has the wrong shape or negative values.
    """
    weight = None
    if query_moment is not None:
        weight = _balance(_checked_moment(query_moment, energy), energy, floor)
        energy = energy * weight.square()
    order = channel_order(energy) if len(groups) > 1 else None
    return ChannelTransform(centre, weight, order)


@in_named_dtypes
def value_statistics(
    values: Tensor, groups: Sequence[ChannelGroup], in_use: Tensor | None = None
) -> ChannelTransform:
    """The transform of values: with several groups, the channels in order of descending energy.

    Args:
        values: [B, Hkv, T, D] floating.
        groups: channel groups of the codec.
        in_use: [B, Hkv, T] bool, the tokens that count; None: all.

    Returns:
        With several groups order int16 [B, Hkv, D]; else the identity, and `values` are not read.

    Raises:
        EmptyContextError: T is 0.
        NonFiniteError: values hold NaN or infinity.
        InvalidInputError: `values` is not [B, Hkv, T, D].
    """
    if len(groups) <= 1:
        return ChannelTransform()
    return ChannelTransform(order=channel_order(token_energy(values, None, "values", in_use)))


def _spread(part: Tensor, x: Tensor) -> Tensor:
    """[B, Hkv, D] -> [B, Hkv, 1, ..., 1, D] with x's number of dimensions."""
    return part.view(*part.shape[:2], *[1] * (x.ndim - 3), part.shape[-1])


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(-1, _spread(order.long(), x).expand_as(x))


def _balance(query_moment: Tensor, key_moment: Tensor, floor: float) -> Tensor:
    ratio = relative_moment(query_moment, floor) / relative_moment(key_moment, floor)
    log_weight = ratio.log() * _BALANCE_EXPONENT
    weight = (log_weight - log_weight.mean(-1, keepdim=True)).exp().to(torch.bfloat16).float()
    return weight.where(query_moment.amax(-1, keepdim=True) > 0, 1.0)  # queries that are not known


def _checked_moment(query_moment: Tensor, energy: Tensor) -> Tensor:
    if query_moment.shape != energy.shape:
        raise InvalidInputError(
            f"query_moment has shape {tuple(query_moment.shape)} but the keys need [B, Hkv, D] = "
            f"{tuple(energy.shape)}; average it over the query heads of each KV head"
        )
    moment = finite(query_moment.to(energy), "query_moment")
    judge(check_least_moment, moment.amin(-1))
    return moment


def check_least_moment(least: list[float]) -> None:
    """Refuse moments of queries by the least ones of each head.

    Raises:
        InvalidInputError: one is negative.
    """
    if min(least) < 0:
        raise InvalidInputError(
            f"query_moment holds {min(least)}; it is a mean of squares, so never negative"
        )


def channel_order(energy: Tensor) -> Tensor:
    """Channels by descending energy: [..., D] -> [..., D] int16; equal channels keep their order."""
    return energy.argsort(dim=-1, descending=True, stable=True).to(torch.int16)
