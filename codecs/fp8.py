"""FP8 codes with one scale for a whole tensor, as serving engines store a cache: a control of evaluations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.codecs.parts import portable
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.kernels.layout import PAGE_TOKENS, gather_rows
from quantpress.quantization.transform import ChannelTransform

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448; larger numbers are stored as this."""


@portable("fp8_codec")
@dataclass(frozen=True)
class Fp8Pages(PageCodec):
    """x is stored as the nearest e4m3 number, at most 448 in size, ties to even.

    The scale of the tensor is 1.0 and is not stored. The plane "fp8" is [B, Hkv, P, 128, D],
    `torch.float8_e4m3fn`, 8 bits a value.

    Args:
        head_dim: dimension D of the vectors.

    Source: vLLM 0.33 with `--kv-cache-dtype fp8` (the same as "fp8_e4m3"), where `k_scale` and `v_scale` are
    1.0 for a checkpoint that brings no scales. Scales of a checkpoint are not modelled, and neither is what
    engines round beside the cache, such as queries.

    Example:
        >>> codec = Fp8Pages(2)
        >>> planes = codec.encode(torch.tensor([3.1, -500.0]).expand(1, 1, 128, 2), ChannelTransform())
        >>> codec.decode_code_space(planes)[0, 0, 0].tolist()
        [3.0, -448.0]
    """

    head_dim: int

    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        pages = x.reshape(*x.shape[:2], -1, PAGE_TOKENS, self.head_dim)
        # Clamped, because not every version and device of torch saturates in the cast.
        return {"fp8": pages.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)}

    def decode_code_space(self, planes: Planes) -> Tensor:
        return planes["fp8"].flatten(2, 3).float()

    def gather(self, planes: Planes, tokens: Tensor) -> Planes:
        # As bytes: torch gathers no float8 on a CPU.
        return {"fp8": gather_rows(planes["fp8"].view(torch.uint8), tokens).view(torch.float8_e4m3fn)}
