"""`CodecSpec`: the parameters of a scalar codec, which encode, decode, attention and saved caches share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError, UnsupportedBitsError
from quantpress.quantization.budget import ALLOWED, ChannelGroup, split_channels
from quantpress.quantization.codebook import CODEBOOK_FORMS, Codebook, codebook
from quantpress.quantization.qjl import sketch_matrix
from quantpress.quantization.rotation import ROTATION_KINDS, Rotation

ROLES = ("key", "value")
SCALE_RULES = ("auto", "norm_corrected", "unbiased", "norm")
ESTIMATORS = ("mse", "prod")
SCALE_DTYPES = {
    "auto": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
PROD_BITS = (2, 3, 4)
MAX_SPEC_SEED = 2**32

_SKETCH_STREAM = 15
_STREAMS = 16  # seeds a role may use: one per group, and the last one for the sketch


@dataclass(frozen=True)
class CodecSpec:
    """The scalar codec of the keys, or of the values, of one layer.

    Args:
        head_dim: channels D of one head, a multiple of 4 in 8 to 1024.
        bits: code width per channel: 1, 2, 3, 4, 8 or a fraction between 1 and 4.
        role: "key" or "value".
        rotation: "hadamard", "haar" or "identity".
        seed: whole number, 0 <= seed < 2**32. Each role and group derives a seed of its own from it.
        scale: what is stored beside the codes of a group y = |y| u whose levels are l. "norm": |y|.
            "norm_corrected": |y| / |l|, so that the decoded norm is exact. "unbiased": |y|^2 / <y, l>, so
            that the decoded vector projects onto y exactly. "auto": norm_corrected for keys, unbiased for
            values, norm for "prod".
        codebook: "int8" or "lloyd_max".
        estimator: "mse", or "prod": a code of bits - 1 and a 1-bit QJL sketch of its residual.
        scale_dtype: dtype of scales and residual norms. "auto": float16, but float32 for pages with vectors
            whose scales float16 does not hold, see `quantpress.kernels.encode`. "float16": a scale of 65504
            or more is an error, and scales below 6e-5 lose precision. "bfloat16" and "float32" hold every
            length.
        page_keys: each page of 128 tokens stores two keys in the dtype of the scales, its mean and its
            likeliest sink, and the codes are of keys without the mean. For keys of a whole width with "mse".
            Tokens of such pages stay in their page.

    Raises:
        UnsupportedBitsError: `bits` cannot be stored, or not with this estimator.
        UnsupportedHeadDimError: `head_dim` cannot be packed.
        InvalidInputError: another argument has none of the values above.

    Source: TurboQuant, arXiv 2504.19874, Algorithms 1 and 2.

    >>> CodecSpec(head_dim=128, bits=4, role="key").bits_per_value
    4.125
    """

    head_dim: int
    bits: float
    role: str
    rotation: str = "hadamard"
    seed: int = 0
    scale: str = "auto"
    codebook: str = "int8"
    estimator: str = "mse"
    scale_dtype: str = "auto"
    page_keys: bool = False

    def __post_init__(self) -> None:
        _check_choice("role", self.role, ROLES)
        _check_choice("rotation", self.rotation, ROTATION_KINDS)
        _check_choice("scale", self.scale, SCALE_RULES)
        _check_choice("codebook", self.codebook, CODEBOOK_FORMS)
        _check_choice("estimator", self.estimator, ESTIMATORS)
        _check_choice("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES))
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or not 0 <= self.seed < MAX_SPEC_SEED:
            raise InvalidInputError(f"seed must be a whole number in 0 to 2**32 - 1, got {self.seed!r}")
        if not isinstance(self.bits, Real):  # such as a list, which `split_channels` could not cache
            raise UnsupportedBitsError(f"bits={self.bits!r} is not a code width; {ALLOWED}")
        split_channels(self.bits, self.head_dim)
        if self.estimator == "prod" and self.bits not in PROD_BITS:
            raise UnsupportedBitsError(
                f"estimator='prod' stores {PROD_BITS} bits, got {self.bits!r}; "
                "use one of them or estimator='mse'"
            )
        if self.page_keys and (self.role, self.estimator, len(self.groups)) != ("key", "mse", 1):
            raise InvalidInputError(
                f"page_keys is for keys of a whole width with estimator='mse', not for {self.role}s of "
                f"{self.bits} bits with {self.estimator!r}; leave it out"
            )

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The channel groups in the order of storage, outliers first; for "prod" one group of bits - 1."""
        return split_channels(self.bits - (self.estimator == "prod"), self.head_dim)

    @property
    def scale_rule(self) -> str:
        """`scale` with "auto" resolved: "norm_corrected", "unbiased" or "norm"."""
        if self.scale != "auto":
            return self.scale
        if self.estimator == "prod":
            return "norm"  # leaves the smallest residual to the sketch, which is unbiased already
        return "norm_corrected" if self.role == "key" else "unbiased"

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """`scale_dtype` as a torch dtype; float16 for "auto", which nearly every page has."""
        return SCALE_DTYPES[self.scale_dtype]

    @property
    def bits_per_value(self) -> float:
        """Stored bits per channel: codes, one scale per group, and for "prod" residual norm and sketch.

        Where "auto" stores scales in float32, each takes 16 bits more. What a page stores once does not
        count.
        """
        codes = sum(group.channels * group.bits for group in self.groups)
        scalars = len(self.groups)
        if self.estimator == "prod":
            codes += self.head_dim
            scalars += 1
        return (codes + scalars * self.torch_scale_dtype.itemsize * 8) / self.head_dim

    def rotation_of(self, group: int) -> Rotation:
        """The rotation of one group, over the group's channels."""
        return Rotation(self.groups[group].channels, self.rotation, self._seed_of(group))

    def codebook_of(self, group: int) -> Codebook:
        """The codebook of one group, for its width and number of channels."""
        channels, bits = self.groups[group].channels, self.groups[group].bits
        return codebook(bits, channels, self.codebook)

    def sketch_matrix(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """The [D, D] Gaussian matrix of the "prod" estimator. Cached and shared: do not write to it."""
        return sketch_matrix(self.head_dim, self._seed_of(_SKETCH_STREAM), device, dtype)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CodecSpec:
        """The spec that `to_dict` wrote.

        Raises:
            InvalidInputError: a field is unknown, missing or has a value that cannot be used.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        missing = sorted({"head_dim", "bits", "role"} - set(data))
        if unknown or missing:
            raise InvalidInputError(
                f"not a codec of this version: unknown fields {unknown}, missing fields {missing}; "
                f"its fields are {sorted(known)}"
            )
        return cls(**data)

    def _seed_of(self, stream: int) -> int:
        return (self.seed * len(ROLES) + ROLES.index(self.role)) * _STREAMS + stream


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidInputError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}")
