"""Uniform integer codes behind a Hadamard rotation of blocks of channels: a control of evaluations.

A few channels of keys are often much larger than the others and would set the range of every code. The
rotation spreads them over their block.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.codecs.parts import portable
from quantpress.codecs.protocol import Planes
from quantpress.codecs.uniform import UniformPages
from quantpress.errors import InvalidInputError
from quantpress.quantization.transform import ChannelTransform


@portable("block_hadamard_codec")
@dataclass(frozen=True)
class BlockHadamardPages(UniformPages):
    """`UniformPages` of vectors whose blocks of neighbouring channels are rotated.

    Args:
        head_dim: as in `UniformPages`.
        bits: as there.
        axis: as there.
        group: as there.
        block: channels of a block, a power of two that divides `head_dim`. None is the largest one that does,
            at most 128.

    Raises:
        InvalidInputError: the block is not a power of two, or does not divide `head_dim`; or an error of
            `UniformPages`.

    Source: SAW-INT4, arXiv 2604.19157, and its code (github.com/togethercomputer/saw-int4): Walsh-Hadamard
    matrices in Sylvester's order without random signs, then 4 bits with a minimum and a step for each token
    and head. Two details differ. It stores a scale and a zero point in float32, where `UniformPages` has
    a step and a minimum in float16. It rounds rotated numbers to bfloat16 before it codes them; here they
    stay in float32.

    Example:
        >>> BlockHadamardPages(128, 4).bits_per_value
        4.25
    """

    block: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self._block
        if size < 1 or size & (size - 1) or self.head_dim % size:
            raise InvalidInputError(
                f"blocks of {size} channels in heads of {self.head_dim}; give a power of two that divides it"
            )

    @property
    def _block(self) -> int:
        return math.gcd(self.head_dim, 128) if self.block is None else self.block

    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        """Pack x as `UniformPages.encode` does, after the rotation."""
        return super().encode(self.to_code_space(x.float()), transform)

    def to_code_space(self, x: Tensor) -> Tensor:
        """Rotate [..., D] float32; the same matrix turns it back."""
        stride, shape = 1, x.shape
        while stride < self._block:
            low, high = x.reshape(*shape[:-1], -1, 2, stride).unbind(-2)
            x = torch.stack((low + high, low - high), -2)
            stride *= 2
        return x.reshape(shape) / math.sqrt(self._block)

    def from_code_space(self, y: Tensor) -> Tensor:
        return self.to_code_space(y)
