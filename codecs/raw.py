"""The lossless codec: pages hold the vectors as they are. It saves nothing; it proves the cache around it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.codecs.parts import portable
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.kernels.layout import PAGE_TOKENS, gather_rows
from quantpress.quantization.transform import ChannelTransform


@portable("raw_codec")
@dataclass(frozen=True)
class RawPages(PageCodec):
    """Vectors as they are, page by page.

    Args:
        head_dim: dimension D of the vectors.
        bits: bits of the vectors' dtype, for reports.
    """

    head_dim: int
    bits: int = 16

    @property
    def bits_per_value(self) -> float:
        return float(self.bits)

    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        batch, heads, tokens, dim = x.shape
        return {"raw": x.reshape(batch, heads, tokens // PAGE_TOKENS, PAGE_TOKENS, dim).clone()}

    def decode(self, planes: Planes, transform: ChannelTransform, dtype: torch.dtype) -> Tensor:
        return planes["raw"].flatten(2, 3).to(dtype)

    def decode_code_space(self, planes: Planes) -> Tensor:
        return planes["raw"].flatten(2, 3).float()

    def gather(self, planes: Planes, tokens: Tensor) -> Planes:
        return {"raw": gather_rows(planes["raw"], tokens)}
