"""`Trellis`: which level each code of a vector stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from quantpress.errors import UnsupportedBitsError
from quantpress.kept import kept

BITS = (1, 2, 3, 4)
Filters = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Trellis:
    """A trellis of 2**w states, one level each; w is 8, or 9 at 3 bits.

    The state at channel t is the last w bits of codes c_0 ... c_t, c_t lowest: its bit i is bit i % b of the
    code i // b channels back. Vectors are tail-biting: c_-1 is the last code of the vector, so that every
    sequence of codes has states, and b bits a channel are all that is stored.

    Args:
        bits: code width b, 1 to 4.
        levels: the level of each state, 2**w numbers, for coordinates of unit variance.
        taps: w numbers, where the levels are linear in the bits of the state; see `linear`. Else None.

    Source: trellis coded quantization, Marcellin and Fischer 1990; states that are windows over the codes:
    QTIP, arXiv 2406.11235.
    """

    bits: int
    levels: tuple[float, ...]
    taps: tuple[float, ...] | None = None

    @classmethod
    def linear(cls, bits: int, taps: Sequence[float]) -> Trellis:
        """A trellis whose levels are sums of one tap for each bit: level = sum_i taps[i] * (2 * bit_i - 1).

        >>> Trellis.linear(2, [0.5, 0.25, 0, 0, 0, 0, 0, 0]).levels[:4]
        (-0.75, 0.25, -0.25, 0.75)
        """
        states = range(1 << len(taps))
        levels = (sum(tap if state >> i & 1 else -tap for i, tap in enumerate(taps)) for state in states)
        return cls(bits, tuple(levels), tuple(taps))

    @property
    def state_bits(self) -> int:
        """Bits of a state, w."""
        return len(self.levels).bit_length() - 1

    @property
    def state_dtype(self) -> torch.dtype:
        """In which states are held."""
        return torch.uint8 if self.state_bits <= 8 else torch.int16

    @property
    def reach(self) -> int:
        """How many codes a state depends on, its own included: w / b, rounded up."""
        return -(-self.state_bits // self.bits)

    def states(self, codes: Tensor) -> Tensor:
        """States of codes: [..., D] uint8 -> [..., D] of `state_dtype`; D is at least `reach`."""
        state, known, back = codes.to(self.state_dtype), self.bits, 1
        while known < self.state_bits:  # the bits that a state has already
            state = state.roll(back, -1).bitwise_left_shift_(known).bitwise_or_(state)
            known, back = 2 * known, 2 * back
        return state & len(self.levels) - 1 if known > self.state_bits else state

    @property
    def filters(self) -> Filters:
        """Taps by bit and lag, [b][reach], which decode vectors without a lookup; () where levels are free.

        With s_k = 2 * (bit k of the codes) - 1, coordinates of unit variance are sums over bits k and lags j:

            x_t = sum_kj filters[k][j] * s_k[(t - j) mod D]

        >>> Trellis.linear(3, [1, 2, 3, 4, 5, 6, 7, 8]).filters
        ((1, 4, 7), (2, 5, 8), (3, 6, 0.0))
        """
        if self.taps is None:
            return ()
        padded = *self.taps, *[0.0] * (self.bits * self.reach - self.state_bits)
        return tuple(padded[k :: self.bits] for k in range(self.bits))

    def level_tensor(self, head_dim: int, device: torch.device | str | None = None) -> Tensor:
        """[2**w] float32 levels of unit vectors of this dimension, on the CPU when no device is given."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device="cpu" if device is None else device)
        return levels.mul_(head_dim**-0.5)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Levels of the codes of unit vectors: [..., D] uint8 -> [..., D] float32."""
        levels = shared_levels(self, codes.shape[-1], codes.device)
        return levels.index_select(0, self.states(codes).int().flatten()).view(codes.shape)


@lru_cache(maxsize=len(BITS), typed=True)
def trellis(bits: int) -> Trellis:
    """The shipped trellis of a width: free levels at 1 bit, taps at 2, 3 and 4.

    Raises:
        UnsupportedBitsError: `bits` is not 1, 2, 3 or 4.

    >>> trellis(2).reach, len(trellis(2).levels), len(trellis(2).filters)
    (4, 256, 2)
    >>> trellis(3).reach, len(trellis(3).levels), len(trellis(3).filters)
    (3, 512, 3)
    """
    if bits not in BITS or not isinstance(bits, int):
        raise UnsupportedBitsError(
            f"there are trellis codes of 1, 2, 3 and 4 bits, not of {bits!r}; give one of these, or another "
            "codebook"
        )
    row = _shipped()[str(bits)]
    return Trellis.linear(bits, row["taps"]) if "taps" in row else Trellis(bits, tuple(row["levels"]))


@kept
def shared_levels(code: Trellis, head_dim: int, device: torch.device) -> Tensor:
    """`Trellis.level_tensor`, cached and shared: do not write to it."""
    return code.level_tensor(head_dim, device)


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    """Rows of levels.json by width (written by `levels.py`)."""
    path = resources.files("quantpress.quantization.trellis") / "levels.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return rows
