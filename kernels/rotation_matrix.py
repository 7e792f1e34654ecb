"""Rotations as operands of 16-bit matrix products with the precision of float32."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.kept import kept
from quantpress.quantization.rotation import Rotation

_SPLIT_SCALE = 2.0**12  # keeps the low halves of a rotation's entries among float16's normal numbers


@dataclass(frozen=True, eq=False)
class RotationMatrix:
    """A rotation, or another matrix, as the sum of one or two float16 matrices.

    Args:
        halves: [1 or 2, CP, CP] float16, zero outside the rotation's channels. One matrix of -1, 0 and 1
            where the rotation is such a matrix times a factor; else the high and the low halves of its
            entries.
        factor: the rotation is factor times the sum of the halves.
    """

    halves: Tensor
    factor: float


def padded(channels: int) -> int:
    """The power of two, at least 16, to which a tile of this many channels is padded."""
    return max(16, 1 << (channels - 1).bit_length())


@kept
def rotation_matrix(rotation: Rotation, device: torch.device, inverse: bool = False) -> RotationMatrix:
    """R.T, for y = x @ R.T, or if `inverse` R, for x = y @ R, on a device; cached."""
    exact = rotation.matrix() if inverse else rotation.matrix().T
    factor = 1.0 if rotation.kind == "identity" else 1 / math.sqrt(rotation.dim)
    signs = (exact / factor).round()
    if bool(signs.abs().max() <= 1) and bool((signs * factor - exact).abs().max() < 1e-12):
        return _operand([signs], factor, device)
    return halved(exact, device)


def halved(exact: Tensor, device: torch.device) -> RotationMatrix:
    """A matrix [C, C] float64, with entries of up to 15, in two halves on a device."""
    factor = 1 / _SPLIT_SCALE
    high = (exact / factor).half()
    return _operand([high, exact / factor - high.double()], factor, device)


def _operand(parts: list[Tensor], factor: float, device: torch.device) -> RotationMatrix:
    channels = len(parts[0])
    size = padded(channels)
    halves = torch.zeros(len(parts), size, size, dtype=torch.float16, device="cpu")
    for half, part in zip(halves, parts, strict=True):
        half[:channels, :channels] = part.half()
    return RotationMatrix(halves.to(device), factor)
