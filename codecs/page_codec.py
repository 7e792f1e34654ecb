"""What a codec must offer for the cache and attention to use it, and the two codecs there are.

A codec turns whole pages of keys or values into *planes*: named tensors whose first three dimensions are
[B, Hkv, P] (batch, KV heads, pages). The cache never looks inside a plane; it only appends, crops, indexes
and moves them, so another codec (a trellis, a lossless one for tests) needs no change there.

Attention works in *code space*, where decoding is cheapest: for any vector x and query q,

    q . x = to_code_space(transform.query(q)) . decode_code_space(encode(x)) + transform.bias(q)

up to the codec's own error. Keys are scored there, values are summed there and brought back once per query.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from quantpress.kernels.dequantize import decode_code_space, decode_pages, from_code_space, to_code_space
from quantpress.kernels.encode import encode_pages
from quantpress.kernels.gather_tokens import gather_rows, gather_tokens
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

Planes = dict[str, torch.Tensor]


class PageCodec(Protocol):
    """Packs whole pages of vectors and decodes them.

    Attributes:
        head_dim: dimension D of the vectors.
        groups: how the channels are split over code widths; more than one asks for a channel order, none for
            no statistics at all.
        wants_statistics: whether a mean and channel weights should be taken from the data before encoding.
        bits_per_value: true stored bits per coordinate, scales included.
    """

    @property
    def head_dim(self) -> int: ...
    @property
    def groups(self) -> tuple[ChannelGroup, ...]: ...
    @property
    def wants_statistics(self) -> bool: ...
    @property
    def bits_per_value(self) -> float: ...

    def encode(self, x: torch.Tensor, transform: ChannelTransform) -> Planes:
        """Pack x [B, Hkv, T, D], T a multiple of `PAGE_TOKENS`, into planes [B, Hkv, P, ...]."""
        ...

    def decode(self, planes: Planes, transform: ChannelTransform, dtype: torch.dtype) -> torch.Tensor:
        """Bring planes back to [B, Hkv, T, D] in `dtype`."""
        ...

    def gather(self, planes: Planes, tokens: torch.Tensor) -> Planes:
        """Make pages of the tokens [B, Hkv, N] int64, N a multiple of `PAGE_TOKENS`, as they are stored."""
        ...

    def decode_code_space(self, planes: Planes) -> torch.Tensor:
        """Decode to [B, Hkv, T, D] float32 in code space."""
        ...

    def to_code_space(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., D] float32, already through the transform, into code space."""
        ...

    def from_code_space(self, y: torch.Tensor) -> torch.Tensor:
        """Map [..., D] float32 from code space back to the transform's output space."""
        ...


@dataclass(frozen=True)
class ScalarPages:
    """Rotation, scalar codebook and one stored scale per vector (TurboQuant): see `CodecSpec`.

    Args:
        spec: the codec's parameters.
    """

    spec: CodecSpec

    @property
    def head_dim(self) -> int:
        return self.spec.head_dim

    @property
    def in_one_dtype(self) -> "ScalarPages":
        """The same with scales of one dtype, for memory that is allocated before there are vectors."""
        if self.spec.scale_dtype != "auto":
            return self
        return ScalarPages(replace(self.spec, scale_dtype="float16"))

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return self.spec.groups

    @property
    def wants_statistics(self) -> bool:
        return True

    @property
    def bits_per_value(self) -> float:
        return self.spec.bits_per_value

    def encode(self, x: torch.Tensor, transform: ChannelTransform) -> Planes:
        return encode_pages(x, self.spec, transform)

    def decode(self, planes: Planes, transform: ChannelTransform, dtype: torch.dtype) -> torch.Tensor:
        return decode_pages(planes, self.spec, transform, dtype)

    def gather(self, planes: Planes, tokens: torch.Tensor) -> Planes:
        return gather_tokens(planes, self.spec, tokens)

    def decode_code_space(self, planes: Planes) -> torch.Tensor:
        return decode_code_space(planes, self.spec)

    def to_code_space(self, x: torch.Tensor) -> torch.Tensor:
        return to_code_space(x, self.spec)

    def from_code_space(self, y: torch.Tensor) -> torch.Tensor:
        return from_code_space(y, self.spec)


@dataclass(frozen=True)
class RawPages:
    """The lossless codec: pages of the vectors as they are. It saves nothing; it proves the cache around it.

    Args:
        head_dim: dimension D of the vectors.
        bits: bits of the stored dtype, for the report.
    """

    head_dim: int
    bits: int = 16

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        return ()

    @property
    def wants_statistics(self) -> bool:
        return False

    @property
    def bits_per_value(self) -> float:
        return float(self.bits)

    def encode(self, x: torch.Tensor, transform: ChannelTransform) -> Planes:
        batch, heads, tokens, dim = x.shape
        return {"raw": x.reshape(batch, heads, tokens // PAGE_TOKENS, PAGE_TOKENS, dim).clone()}

    def decode(self, planes: Planes, transform: ChannelTransform, dtype: torch.dtype) -> torch.Tensor:
        return planes["raw"].flatten(2, 3).to(dtype)

    def gather(self, planes: Planes, tokens: torch.Tensor) -> Planes:
        return {"raw": gather_rows(planes["raw"], tokens)}

    def decode_code_space(self, planes: Planes) -> torch.Tensor:
        return planes["raw"].flatten(2, 3).float()

    def to_code_space(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def from_code_space(self, y: torch.Tensor) -> torch.Tensor:
        return y
