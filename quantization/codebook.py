"""Codebooks: the levels that a coordinate of a rotated unit vector is rounded to.

There are two forms. "lloyd_max" has the levels of least squared error under the exact density of a
coordinate. "int8" has odd integers up to 255 times a common unit, which 8-bit integer tensor cores multiply
without error (see `quantpress.quantization.levels`). At 8 bits these are all odd integers, evenly spaced.
Compared with Lloyd-Max that adds to the distortion, in %:

    D       32      64      128     256
    1 bit   0       0       0       0
    2 bits  0.00001 0.00000 0.00000 0.00005
    3 bits  0.0011  0.0018  0.0032  0.0009
    4 bits  0.052   0.051   0.049   0.051      (at other D from 32 to 256 0.038 to 0.058)
    8 bits  82      97      105     109

At 8 bits the distortion is 0.00008 in place of 0.00004; at 4 bits it is 0.0093.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError, UnsupportedBitsError
from quantpress.quantization.density import CoordinateDensity
from quantpress.quantization.levels import check_bits, fit_odd_levels, lloyd_max, positive_levels

__all__ = ["CODEBOOK_FORMS", "INT8_BITS", "Codebook", "codebook", "compute_codebook", "lloyd_max"]

CODEBOOK_FORMS = ("int8", "lloyd_max")
INT8_BITS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Codebook:
    """Levels and decision thresholds for one coordinate of a unit vector.

    A code is the index of a level. The nearest level of u is the number of thresholds below u, so a u that
    sits on a threshold takes the lower code.

    Args:
        bits: code width b.
        head_dim: dimension D of the unit vector (of the channel group, when a head is split).
        form: "int8" or "lloyd_max".
        levels: 2**b ascending floats in units of the coordinate, exactly symmetric: levels[i] ==
            -levels[-1-i].
        thresholds: 2**b - 1 floats, the midpoints of neighbouring levels.
        distortion: E|u - dequantize(quantize(u))|^2 of a uniform unit vector u.
        unit: common factor of the levels, levels[i] == scaled[i] * unit.
        scaled: levels / unit; odd integers of magnitude 1 to 255 when form is "int8", in units of 1/sqrt(D)
            when form is "lloyd_max".
    """

    bits: int
    head_dim: int
    form: str
    levels: tuple[float, ...]
    thresholds: tuple[float, ...]
    distortion: float
    unit: float
    scaled: tuple[float, ...]

    def level_tensor(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[2**bits] levels as a tensor, on the CPU when no device is given."""
        return torch.tensor(self.levels, dtype=dtype, device="cpu" if device is None else device)

    def threshold_tensor(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """[2**bits - 1] thresholds as a tensor, on the CPU when no device is given."""
        return torch.tensor(self.thresholds, dtype=dtype, device="cpu" if device is None else device)

    def quantize(self, u: Tensor) -> Tensor:
        """Codes of the nearest levels: [...] floating -> [...] uint8."""
        return torch.bucketize(u, self.threshold_tensor(u.device, u.dtype), out_int32=True).to(torch.uint8)

    def dequantize(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels of codes: [...] uint8 -> [...] `dtype`."""
        return self.level_tensor(codes.device, dtype)[codes.long()]


@lru_cache(maxsize=512, typed=True)  # typed: 4.0 and True are not 4 and 1
def codebook(bits: int, head_dim: int, form: str = "int8") -> Codebook:
    """The codebook of a width, dimension and form, read from the shipped table or else computed.

    Args:
        bits: 1 to 4 or 8 for "int8", 1 to 8 for "lloyd_max".
        head_dim: dimension D >= 2 of the unit vector.
        form: "int8" or "lloyd_max".

    Raises:
        UnsupportedBitsError: the form has no such width.
        UnsupportedHeadDimError: `head_dim` is below 2.
        InvalidInputError: `form` is unknown.

    >>> codebook(2, 128).scaled
    (-163.0, -49.0, 49.0, 163.0)
    """
    _check(bits, form)
    row = _shipped().get(f"{form}/{bits}/{head_dim}")
    if row is None:
        return compute_codebook(bits, head_dim, form)
    return _assemble(bits, head_dim, form, row["scaled"], row["unit"], row["distortion"])


def compute_codebook(bits: int, head_dim: int, form: str) -> Codebook:
    """As `codebook`, but always computed, never read from the table."""
    _check(bits, form)
    half = positive_levels(bits, head_dim)
    if form == "int8":
        scaled, unit = fit_odd_levels(half, head_dim)
    else:
        unit = head_dim**-0.5
        scaled = half / unit
    error = CoordinateDensity(head_dim).distortion(scaled * unit)
    return _assemble(bits, head_dim, form, scaled.tolist(), unit, error)


def _check(bits: int, form: str) -> None:
    check_bits(bits)
    if form not in CODEBOOK_FORMS:
        raise InvalidInputError(f"unknown codebook form {form!r}; use one of {', '.join(CODEBOOK_FORMS)}")
    if form == "int8" and bits not in INT8_BITS:
        raise UnsupportedBitsError(
            f"an int8 codebook has {', '.join(map(str, INT8_BITS))} bits, got {bits!r}; "
            "use one of them or form='lloyd_max'"
        )


def _assemble(bits: int, head_dim: int, form: str, half: list[float], unit: float, error: float) -> Codebook:
    scaled = tuple(-value for value in reversed(half)) + tuple(half)
    levels = tuple(value * unit for value in scaled)
    thresholds = tuple((a + b) / 2 for a, b in pairwise(levels))
    return Codebook(bits, head_dim, form, levels, thresholds, error, unit, scaled)


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    """Rows of codebooks.json by "form/bits/head_dim" (written by `tables.py`)."""
    path = resources.files("quantpress.quantization") / "codebooks.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return rows
