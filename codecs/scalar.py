"""TurboQuant's pages: rotation, a scalar codebook and one stored scale per vector.

Saved pages carry a digest of what follows from the codec's parameters: rotations, codebooks and sketch. It
notices what the parameters do not say: another random stream behind the same seed, or other codebooks. Codes
read with those would decode to noise.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from quantpress.codecs.parts import Parts, kind_of, portable
from quantpress.codecs.protocol import PageCodec, Planes
from quantpress.errors import InvalidInputError
from quantpress.kept import kept
from quantpress.kernels.attend.operands import (
    CodePart,
    KernelOperands,
    PartOperands,
    ScalarOperands,
    SignOperands,
)
from quantpress.kernels.dequantize import decode_code_space, decode_pages, from_code_space, to_code_space
from quantpress.kernels.encode import encode_pages
from quantpress.kernels.layout import PAGE_TOKENS, gather_rows, pack_pages, unpack_pages
from quantpress.quantization.budget import ChannelGroup
from quantpress.quantization.qjl import SQRT_HALF_PI
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

CONSTANTS = "constants"
"""Where the parts of a codec hold the digest."""

_STEP = 2.0**-20  # rotations are made from sines and factorizations, whose last bits differ between machines


@portable("scalar_codec")
@dataclass(frozen=True)
class ScalarPages(PageCodec):
    """Pages of scalar codes, as a `CodecSpec` describes them.

    Args:
        spec: the codec's parameters.

    Source: TurboQuant, arXiv 2504.19874.

    Example:
        >>> ScalarPages(CodecSpec(head_dim=128, bits=3, role="key")).bits_per_value
        3.125
    """

    spec: CodecSpec
    wants_statistics = True

    @property
    def head_dim(self) -> int:  # type: ignore[override]  # the spec's; other codecs have a field
        return self.spec.head_dim

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:  # type: ignore[override]
        return self.spec.groups

    @property
    def bits_per_value(self) -> float:
        shared = 16 * self.spec.torch_scale_dtype.itemsize / PAGE_TOKENS if self.spec.page_keys else 0.0
        return self.spec.bits_per_value + shared

    @property
    def in_one_dtype(self) -> "ScalarPages":
        """The same codec with scales in float16 where `scale_dtype` is "auto"."""
        if self.spec.scale_dtype != "auto":
            return self
        return ScalarPages(replace(self.spec, scale_dtype="float16"))

    def encode(self, x: Tensor, transform: ChannelTransform) -> Planes:
        return encode_pages(x, self.spec, transform)

    def decode(self, planes: Planes, transform: ChannelTransform, dtype: torch.dtype) -> Tensor:
        return decode_pages(planes, self.spec, transform, dtype)

    def gather(self, planes: Planes, tokens: Tensor) -> Planes:
        if self.spec.page_keys:
            raise InvalidInputError(
                "tokens of pages with page_keys cannot be moved to pages with another mean; use a codec "
                "without it where tokens are evicted or sorted"
            )
        widths = {f"codes{i}": (group.bits, group.channels) for i, group in enumerate(self.spec.groups)}
        if self.spec.estimator == "prod":
            widths["sketch"] = (1, self.head_dim)
        return gather_codes(planes, tokens, widths, self.spec.role)

    def decode_code_space(self, planes: Planes) -> Tensor:
        return decode_code_space(planes, self.spec)

    def to_code_space(self, x: Tensor) -> Tensor:
        return to_code_space(x, self.spec)

    def from_code_space(self, y: Tensor) -> Tensor:
        return from_code_space(y, self.spec)

    def kernel_operands(self) -> KernelOperands | None:
        """Rotation and levels; of two channel groups, or of codes and a sketch, those of both."""
        return _operands_of(self.spec)

    def parts(self) -> Parts:
        """The spec's fields, and the digest of what follows from them."""
        return Parts(kind_of(self), {**self.spec.to_dict(), CONSTANTS: constants_digest(self.spec)})

    @classmethod
    def from_parts(cls, parts: Parts) -> "ScalarPages":
        """The codec that `parts` described.

        Codes of 8 bits had the levels of "lloyd_max" once, whatever `codebook` said; such pages are read with
        them.

        Raises:
            InvalidInputError: the pages were packed with other rotations, codebooks or another sketch.
        """
        about = dict(parts.about)
        noted = about.pop(CONSTANTS, None)
        spec = CodecSpec.from_dict(about)
        older = replace(spec, codebook="lloyd_max")
        if spec.bits == 8 and constants_digest(older) == noted:
            return cls(older)
        check_constants(spec, constants_digest(spec), noted)
        return cls(spec)


@kept
def _operands_of(spec: CodecSpec) -> KernelOperands:
    if spec.estimator != "mse" or len(spec.groups) > 1:
        return _parts_of(spec)
    rotation, book = spec.rotation_of(0), spec.codebook_of(0)
    if book.bits == 1 and not spec.page_keys:
        return SignOperands(rotation, float(book.scaled[-1]) * book.unit)
    return ScalarOperands(rotation, book, spec.page_keys)


def _parts_of(spec: CodecSpec) -> PartOperands:
    """The channel groups, and the sketch of the "prod" estimator, as parts."""
    parts, turns = [], []
    for number, group in enumerate(spec.groups):
        book = spec.codebook_of(number)
        parts.append(CodePart(f"codes{number}", f"scale{number}", group.bits, group.channels, book.scaled))
        turns.append(spec.rotation_of(number).matrix() * book.unit)
    turn = torch.block_diag(*turns)
    if spec.estimator == "prod":
        parts.append(CodePart("sketch", "residual", 1, spec.head_dim, (-1.0, 1.0)))
        sketch = spec.sketch_matrix() @ spec.rotation_of(0).matrix()
        turn = torch.cat([turn, sketch * (SQRT_HALF_PI / spec.head_dim)])
    books = [(spec.rotation_of(number), spec.codebook_of(number)) for number in range(len(spec.groups))]
    return PartOperands(tuple(parts), turn, tuple(ScalarOperands(*own) for own in books))


def gather_codes(planes: Planes, tokens: Tensor, widths: dict[str, tuple[int, int]], role: str) -> Planes:
    """Make pages of some of the tokens, as `PageCodec.gather` does.

    Args:
        planes: planes of codes, and others that have one number a token.
        tokens: as for `PageCodec.gather`.
        widths: code width and channels of each plane of codes.
        role: "key" or "value".
    """
    gathered = {}
    for name, plane in planes.items():
        if name in widths:
            bits, channels = widths[name]
            codes = gather_rows(unpack_pages(plane, bits, channels, role), tokens)
            gathered[name] = pack_pages(codes, bits, role)
        else:
            gathered[name] = gather_rows(plane.unsqueeze(-1), tokens).squeeze(-1)
    return gathered


@lru_cache(maxsize=64)
def constants_digest(spec: CodecSpec) -> str:
    """The digest of a codec's rotations, codebooks and sketch."""
    constants = []
    for group in range(len(spec.groups)):
        levels = torch.tensor(spec.codebook_of(group).levels, dtype=torch.float64, device="cpu")
        constants += [spec.rotation_of(group).matrix(), levels]
    if spec.estimator == "prod":
        constants.append(spec.sketch_matrix())
    return digest_of(*constants)


def digest_of(*constants: Tensor) -> str:
    """SHA-256 of numbers, to a precision that every machine reproduces."""
    digest = hashlib.sha256()
    for numbers in constants:
        digest.update((numbers.double() / _STEP).round().to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def check_constants(what: object, found: str, noted: object) -> None:
    """Refuse pages that were packed with other constants.

    Raises:
        InvalidInputError: the digests differ.
    """
    if found != noted:
        raise InvalidInputError(
            f"the rotation or the levels of {what} are not those that the pages were packed with (another "
            "seed, random stream or codebook); pack the context again"
        )
