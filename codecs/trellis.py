"""Pages of trellis codes: TurboQuant's rotation and scales, with codes that are chosen for a whole vector.

The planes take the bytes of those of `ScalarPages` with the same width. Plane "codes0" is uint8
[B, Hkv, P, bits * 16 * D]: a page of 1 bit for each bit of the codes, as in
`quantpress.kernels.trellis.bit_planes`. At 2 bits the squared error is two thirds of a scalar code's. On a
GPU a kernel searches the codes, and attention reads them straight from the pages.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from quantpress.codecs.parts import Parts, kind_of, portable
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.codecs.scalar import CONSTANTS, check_constants, digest_of
from quantpress.kept import kept
from quantpress.kernels.attend.operands import CodePart, KernelOperands, PartOperands, SignOperands
from quantpress.kernels.dequantize import from_code_space, to_code_space
from quantpress.kernels.dequantize.reference import check_planes
from quantpress.kernels.encode import in_range
from quantpress.kernels.encode.reference import (
    check_vectors,
    in_chunks,
    rotated_unit,
    saturate,
    scale_ratio,
)
from quantpress.kernels.layout import gather_rows
from quantpress.kernels.trellis import nearest_path
from quantpress.kernels.trellis.bit_planes import pack_bit_planes, unpack_bit_planes
from quantpress.quantization.numerics import in_named_dtypes
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform
from quantpress.quantization.trellis import Trellis, trellis

WORKSPACE_VALUES = 1 << 22  # coordinates encoded at a time
GPU_WORKSPACE_VALUES = 1 << 24
"""The same on a GPU, which so many keep busy: about 16 bytes of workspace each, 270 MB in all."""


@portable("trellis_codec")
@dataclass(frozen=True)
class TrellisPages(PageCodec):
    """Pages of trellis codes.

    Args:
        head_dim: dimension D of the vectors, as for `CodecSpec`.
        bits: code width, 1, 2, 3 or 4.
        role: "key" or "value".
        rotation: "hadamard", "haar" or "identity".
        seed: of the rotation.
        scale: the stored scale, as for `CodecSpec`.
        scale_dtype: dtype of the scales, as for `CodecSpec`.

    Raises:
        UnsupportedBitsError: there is no trellis of this width.
        UnsupportedHeadDimError: `head_dim` cannot be packed.
        InvalidInputError: another argument has a value that cannot be used.

    Source: TurboQuant, arXiv 2504.19874, with trellis codes in place of a scalar codebook; see
    `quantpress.quantization.trellis`.

    Example:
        >>> TrellisPages(head_dim=128, bits=2, role="key").bits_per_value
        2.125
    """

    head_dim: int
    bits: int
    role: str
    rotation: str = "hadamard"
    seed: int = 0
    scale: str = "auto"
    scale_dtype: str = "auto"
    wants_statistics = True

    def __post_init__(self) -> None:
        trellis(self.bits)
        _spec(self)  # checks the rest

    @property
    def spec(self) -> CodecSpec:
        """Rotation, scales and layout of the pages; its codebook is not used."""
        return _spec(self)

    @property
    def trellis(self) -> Trellis:
        """Which level a code stands for."""
        return trellis(self.bits)

    @property
    def bits_per_value(self) -> float:
        return self.spec.bits_per_value

    @property
    def in_one_dtype(self) -> "TrellisPages":
        """The same codec with scales in float16 where `scale_dtype` is "auto"."""
        return replace(self, scale_dtype="float16") if self.scale_dtype == "auto" else self

    @torch.no_grad()
    @in_named_dtypes
    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        """Pack x as `PageCodec.encode` describes; 128 tokens of a head at D = 64 take 30 ms on one core.

        Raises:
            InvalidInputError: x has the wrong shape or dtype, or a scale is too large for its dtype.
            NonFiniteError: x holds NaN or infinity.
        """
        check_vectors(x, self.spec, transform)
        values = GPU_WORKSPACE_VALUES if x.is_cuda else WORKSPACE_VALUES
        planes = in_chunks(x, transform, self._encode_chunk, values)

        def stored(spec: CodecSpec) -> Planes:
            return planes | {"scale0": saturate(planes["scale0"], spec.torch_scale_dtype)}

        return in_range(stored, self.spec)

    def _encode_chunk(self, pages: Tensor, transform: ChannelTransform) -> Planes:
        """[B, Hkv, P, 128, D] -> planes, with scales in float32."""
        unit, norm = rotated_unit(transform.apply(pages), self.spec.rotation_of(0))
        codes = nearest_path(unit.flatten(0, -2), self.trellis).view(unit.shape)
        ratio = scale_ratio(unit, self.trellis.dequantize(codes), self.spec.scale_rule)
        return {"codes0": pack_bit_planes(codes, self.bits, self.role), "scale0": norm * ratio}

    @in_named_dtypes
    def decode_code_space(self, planes: Planes) -> Tensor:
        check_planes(planes, self.spec)
        codes = unpack_bit_planes(planes["codes0"], self.bits, self.head_dim, self.role)
        scale = planes["scale0"].float().unsqueeze(-1)
        return self.trellis.dequantize(codes).mul_(scale).flatten(2, 3)

    def kernel_operands(self) -> KernelOperands:
        """Rotation and filters of the bit planes; at 1 bit levels, which are free there."""
        return _operands_of(self)

    def to_code_space(self, x: Tensor) -> Tensor:
        return to_code_space(x, self.spec)

    def from_code_space(self, y: Tensor) -> Tensor:
        return from_code_space(y, self.spec)

    def gather(self, planes: Planes, tokens: Tensor) -> Planes:
        codes = unpack_bit_planes(planes["codes0"], self.bits, self.head_dim, self.role)
        packed = pack_bit_planes(gather_rows(codes, tokens), self.bits, self.role)
        scale = gather_rows(planes["scale0"].unsqueeze(-1), tokens).squeeze(-1)
        return {"codes0": packed, "scale0": scale}

    def parts(self) -> Parts:
        """The fields, and a digest of the rotation and the levels."""
        return Parts(kind_of(self), {**vars(self), CONSTANTS: self._digest})

    @classmethod
    def from_parts(cls, parts: Parts) -> "TrellisPages":
        """The codec that `parts` described.

        Raises:
            InvalidInputError: the pages were packed with another rotation or other levels.
        """
        about = dict(parts.about)
        noted = about.pop(CONSTANTS, None)
        codec = cls(**about)
        check_constants(codec, codec._digest, noted)
        return codec

    @property
    def _digest(self) -> str:
        levels = self.trellis.level_tensor(self.head_dim)
        return digest_of(self.spec.rotation_of(0).matrix(), levels)


@kept
def _operands_of(codec: TrellisPages) -> KernelOperands:
    rotation, unit, code = codec.spec.rotation_of(0), codec.head_dim**-0.5, codec.trellis
    if code.filters:
        return SignOperands(rotation, unit, code.filters)
    # levels are free at 1 bit only, where the bits of a state are in the order of `CodePart`
    part = CodePart("codes0", "scale0", code.bits, codec.head_dim, code.levels, code.reach)
    return PartOperands((part,), rotation.matrix() * unit)


@lru_cache(maxsize=64)
def _spec(codec: TrellisPages) -> CodecSpec:
    about = (codec.head_dim, codec.bits, codec.role, codec.rotation, codec.seed, codec.scale)
    return CodecSpec(*about, scale_dtype=codec.scale_dtype)
