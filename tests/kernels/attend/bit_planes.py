"""Pages of bit planes with random codes: what attention reads, without a search.

At 1 bit they are those of trellis codes, and else filters of a few lags.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.codecs.trellis import TrellisPages
from quantpress.kernels.attend.operands import KernelOperands, SignOperands
from quantpress.kernels.dequantize import from_code_space, to_code_space
from quantpress.kernels.layout import pack_pages, page_bytes, unpack_pages
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from quantpress.quantization.trellis.code import Filters

FILTERS: dict[int, Filters] = {
    2: ((0.45, 0.25, -0.26, 0.47), (-0.46, 0.25, 0.27, 0.46)),
    3: ((0.41, -0.23, 0.59), (-0.26, -0.22, 0.33), (0.49, 0.52, 0.0)),
    4: ((-0.49, -0.16), (-0.21, 0.29), (-0.38, 0.55), (-0.39, -0.62)),
}


@dataclass(frozen=True)
class BitPlanes(PageCodec):
    """Random codes, with the norms of the vectors as scales."""

    head_dim: int
    bits: int
    role: str
    wants_statistics = True

    @property
    def spec(self) -> CodecSpec:
        return CodecSpec(self.head_dim, self.bits, self.role)

    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        shape = (*x.shape[:2], -1, 128, self.head_dim)
        codes = torch.randint(1 << self.bits, x.shape, dtype=torch.uint8, device=x.device).view(shape)
        planes = [pack_pages(codes >> k & 1, 1, self.role) for k in range(self.bits)]
        scale = transform.apply(x).float().norm(dim=-1).view(shape[:-1])
        return {"codes0": torch.cat(planes, -1), "scale0": scale.to(torch.float16)}

    def decode_code_space(self, planes: Planes) -> Tensor:
        if self.bits == 1:
            return TrellisPages(self.head_dim, 1, self.role).decode_code_space(planes)
        size = page_bytes(1, self.head_dim)
        y = torch.zeros((), dtype=torch.float32)
        for plane, taps in zip(planes["codes0"].split(size, -1), FILTERS[self.bits], strict=True):
            signs = 2.0 * unpack_pages(plane, 1, self.head_dim, self.role) - 1
            y = y + sum(tap * signs.roll(lag, -1) for lag, tap in enumerate(taps))
        return (y * planes["scale0"].float().unsqueeze(-1) * self.head_dim**-0.5).flatten(2, 3)

    def to_code_space(self, x: Tensor) -> Tensor:
        return to_code_space(x, self.spec)

    def from_code_space(self, y: Tensor) -> Tensor:
        return from_code_space(y, self.spec)

    def kernel_operands(self) -> KernelOperands:
        if self.bits == 1:
            return TrellisPages(self.head_dim, 1, self.role).kernel_operands()
        return SignOperands(self.spec.rotation_of(0), self.head_dim**-0.5, FILTERS[self.bits])
