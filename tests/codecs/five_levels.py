"""A codec of five levels, in one file: what somebody else's codec takes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.codecs.parts import portable
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.transform import ChannelTransform

LEVELS, PER_BYTE = 5, 3  # 5 ** 3 <= 256


@portable("five_level_codec")
@dataclass(frozen=True)
class FiveLevels(PageCodec):
    """Each number becomes -2, -1, 0, 1 or 2 times half the largest of its token; three codes to a byte."""

    head_dim: int

    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        pages = x.float().unflatten(2, (-1, PAGE_TOKENS))  # [B, Hkv, P, 128, D]
        scale = (pages.abs().amax(-1) / 2).half()
        codes = (pages / scale.float().clamp(min=1e-6).unsqueeze(-1)).round().clamp(-2, 2) + 2
        padded = torch.nn.functional.pad(codes, (0, -self.head_dim % PER_BYTE))
        digits = padded.unflatten(-1, (-1, PER_BYTE)) * LEVELS ** torch.arange(PER_BYTE, device=x.device)
        return {"codes": digits.sum(-1).to(torch.uint8), "scale": scale}

    def decode_code_space(self, planes: Planes) -> Tensor:
        digits = LEVELS ** torch.arange(PER_BYTE, device=planes["codes"].device)
        codes = (planes["codes"].unsqueeze(-1) // digits % LEVELS).flatten(-2)[..., : self.head_dim]
        return ((codes.float() - 2) * planes["scale"].float().unsqueeze(-1)).flatten(2, 3)
