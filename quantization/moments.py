"""First and second moments of keys and values over their tokens, in float32 with bounded workspace."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import NoReturn

import torch
from torch import Tensor

from quantpress.deferred import judge
from quantpress.errors import EmptyContextError, InvalidInputError, NonFiniteError

_CHUNK_VALUES = 2**22  # float32 workspace of 16 MB
_GPU_CHUNK_VALUES = 2**24  # of 64 MB: fewer launches


def token_mean(x: Tensor, name: str, in_use: Tensor | None = None) -> Tensor:
    """E[x] over tokens.

    Args:
        x: [B, Hkv, T, D] any float dtype.
        name: what messages call x, in the plural.
        in_use: [B, Hkv, T] bool, the tokens that count; None: all. The mean over no tokens is 0.

    Returns:
        [B, Hkv, D] float32.

    Raises:
        EmptyContextError: T is 0.
        NonFiniteError: x holds NaN or infinity.
        InvalidInputError: x is not [B, Hkv, T, D].
    """
    _check_states(x, name)
    total = torch.zeros(x.shape[0], x.shape[1], x.shape[3], dtype=torch.float32, device=x.device)
    for chunk, used in _chunks(x, in_use):
        chunk = chunk if used is None else chunk.masked_fill(~used, 0)
        total += chunk.sum(2, dtype=torch.float32)
    return finite(total / _count(x, in_use), name)


def token_energy(x: Tensor, centre: Tensor | None, name: str, in_use: Tensor | None = None) -> Tensor:
    """E[(x - centre)^2] over tokens: [B, Hkv, D] float32.

    Args:
        x: as for `token_mean`.
        centre: [B, Hkv, D] float32, or None for 0.
        name: as for `token_mean`.
        in_use: as for `token_mean`.

    Raises:
        EmptyContextError, NonFiniteError, InvalidInputError: as for `token_mean`.
    """
    _check_states(x, name)
    total = torch.zeros(x.shape[0], x.shape[1], x.shape[3], dtype=torch.float32, device=x.device)
    for chunk, used in _chunks(x, in_use):
        deviation = chunk.float() if centre is None else chunk - centre[:, :, None]  # in float32
        deviation = deviation if used is None else deviation.masked_fill(~used, 0)
        total += deviation.square().sum(2)
    return finite(total / _count(x, in_use), name)


def relative_moment(moment: Tensor, floor: float) -> Tensor:
    """A moment [..., D] over its mean over channels, at least `floor`; 1 where every channel is zero."""
    average = moment.mean(-1, keepdim=True)
    return torch.where(average > 0, moment / average, 1.0).clamp_min(floor)


def finite(x: Tensor, name: str) -> Tensor:
    """Return x, which must be finite.

    Args:
        x: any shape.
        name: what the message calls x, in the plural.

    Raises:
        NonFiniteError: x holds NaN or infinity.
    """

    def verdict(ends: list[float]) -> None:
        if not all(map(isfinite, ends)):
            refuse_not_finite(name)

    if x.numel():
        judge(verdict, *torch.aminmax(x.detach()))
    return x


def refuse_not_finite(name: str) -> NoReturn:
    """Raise the error for numbers that are not finite, by what it calls them, in the plural."""
    raise NonFiniteError(
        f"{name} hold NaN or infinity; check the model's dtype (float16 overflows: load it in bfloat16)"
    )


def _chunks(x: Tensor, in_use: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    values = _GPU_CHUNK_VALUES if x.is_cuda else _CHUNK_VALUES
    tokens = max(1, values // max(1, x.shape[0] * x.shape[1] * x.shape[3]))
    for start in range(0, x.shape[2], tokens):
        part = slice(start, start + tokens)
        yield x[:, :, part], None if in_use is None else in_use[:, :, part, None]


def _count(x: Tensor, in_use: Tensor | None) -> Tensor | int:
    return x.shape[2] if in_use is None else in_use.sum(2, keepdim=True).clamp_min(1)


def _check_states(x: Tensor, name: str) -> None:
    if x.ndim != 4:
        raise InvalidInputError(f"{name} must be [B, Hkv, T, D], got shape {tuple(x.shape)}")
    if x.shape[2] == 0:
        raise EmptyContextError(f"{name} of shape {tuple(x.shape)} hold no token; pack after the first one")
