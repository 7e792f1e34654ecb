"""Reports on a codec: how exact it is, measured beside theory, and how many bytes a cache takes."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes
from quantpress.quantization.bounds import lloyd_max_distortion, paper_mse_bound, shannon_distortion
from quantpress.quantization.density import CoordinateDensity
from quantpress.quantization.spec import CodecSpec

BIAS_TOLERANCE = 1e-3  # absolute; a rounded scale and a finite sample move the bias of the finest codes, too

_GRID = 1 << 17  # points in [0, 1]: more than a hundred between two levels of 8 bits
_STATISTIC_BYTES = 4  # mean and weight are float32
_ORDER_BYTES = 2  # a channel order is int16


@dataclass(frozen=True)
class CodecReport:
    """A codec measured on random vectors of uniform direction. Distortions are E|x - x^|^2 / |x|^2.

    Args:
        head_dim: D of the vectors.
        samples: how many vectors were measured.
        bits_per_value: stored bits per coordinate, scales included.
        distortion: the measured distortion, the mean over the samples.
        standard_error: its standard error; at least that which the codebooks let expect: at 8 bits most of
            it comes from few coordinates beyond the last level, and a sample may have too few of them.
        expected: the distortion that follows from the codec's codebooks, scale rule and estimator.
        optimum: the distortion of the best scalar codebook (Lloyd-Max) with as many code bits in each channel
            group.
        shannon: the least distortion of any code with as many code bits per coordinate, in high dimension.
        paper_bound: sqrt(3) pi / 2 * 4^-bits, the upper bound of TurboQuant's Theorem 1, averaged over
            channel groups; None with a sketch and with evenly spaced levels of 8 bits, to which it does not
            apply.
        bias: measured E<x, x^> / |x|^2 - 1, the shrinkage of inner products.
        expected_bias: the bias that follows from the scale rule; 0 for unbiased codes.
    """

    head_dim: int
    samples: int
    bits_per_value: float
    distortion: float
    standard_error: float
    expected: float
    optimum: float
    shannon: float
    paper_bound: float | None
    bias: float
    expected_bias: float

    @property
    def tolerance(self) -> float:
        """Relative deviation of the distortion that is allowed: O(1 / D) in the theory, and sampling."""
        return 0.02 + 4 / self.head_dim + 5 * self.standard_error / self.expected

    @property
    def ok(self) -> bool:
        """Whether distortion and bias are what they should be, within the tolerance."""
        allowed = self.tolerance * self.expected
        right_length = abs(self.bias - self.expected_bias) <= allowed + BIAS_TOLERANCE
        return abs(self.distortion - self.expected) <= allowed and right_length


@dataclass(frozen=True)
class MemoryReport:
    """The bytes of a cache whose keys and values both have one codec's format.

    Args:
        context: tokens cached per sequence.
        packed_tokens: tokens in packed pages.
        dense_tokens: tokens in the model's dtype: sinks, recent tokens, and those that do not fill a page.
        code_bytes: bytes of codes and sketches.
        scale_bytes: bytes of scales and residual norms.
        dense_bytes: bytes of the tokens in the model's dtype.
        metadata_bytes: bytes of the mean key and channel weights of each head, and of channel orders where
            there are two groups; before the first page, of the query moments that the weights will be made
            of.
        uncompressed_bytes: bytes of the same cache uncompressed, in the model's dtype.
    """

    context: int
    packed_tokens: int
    dense_tokens: int
    code_bytes: int
    scale_bytes: int
    dense_bytes: int
    metadata_bytes: int
    uncompressed_bytes: int

    @property
    def total_bytes(self) -> int:
        """All bytes of the packed cache."""
        return self.code_bytes + self.scale_bytes + self.dense_bytes + self.metadata_bytes

    @property
    def ratio(self) -> float:
        """Uncompressed bytes over the bytes of the packed cache."""
        return self.uncompressed_bytes / self.total_bytes


def expected_distortion(spec: CodecSpec) -> tuple[float, float]:
    """The distortion and bias that a codec should have on vectors of uniform direction.

    Let d be the plain distortion of the code l of a unit vector u. Levels that are centroids have
    E|l|^2 = E<u, l> = 1 - d. Up to O(1 / D) that gives

        "norm"            distortion d                   bias -d
        "norm_corrected"  distortion 2 - 2 sqrt(1 - d)   bias sqrt(1 - d) - 1
        "unbiased"        distortion d / (1 - d)         bias 0

    With a sketch the error is (pi / 2 - 1 / D) |r|^2 in place of the residual's |r|^2, and the bias is 0.

    Returns:
        (distortion, bias), both relative to |x|^2.
    """
    distortion = bias = 0.0
    rounding = torch.finfo(spec.torch_scale_dtype).eps ** 2 / 24  # of the scale; its mean over a binade
    for i, group in enumerate(spec.groups):
        part = group.channels / spec.head_dim
        plain = spec.codebook_of(i).distortion
        shrunk = math.sqrt(1 - plain)
        if spec.scale_rule == "norm":
            error, shift = plain, -plain
        elif spec.scale_rule == "norm_corrected":
            error, shift = 2 - 2 * shrunk, shrunk - 1
        else:
            error, shift = plain / (1 - plain), 0.0
        distortion += part * (error + rounding)
        bias += part * shift
    if spec.estimator == "prod":
        return distortion * (math.pi / 2 - 1 / spec.head_dim), 0.0
    return distortion, bias


def _spread(spec: CodecSpec) -> float:
    """Standard deviation of the distortion of one vector, if its coordinates were independent."""
    variance = 0.0
    for i, group in enumerate(spec.groups):
        density, book = CoordinateDensity(group.channels), spec.codebook_of(i)
        u = (np.arange(_GRID) + 0.5) / _GRID
        weight = 2 / _GRID * density.pdf(u)  # of u and of -u
        error = (u - np.array(book.levels)[np.searchsorted(book.thresholds, u)]) ** 2
        mean = float(weight @ error)
        variance += (
            group.channels * (float(weight @ error**2) - mean**2) * (group.channels / spec.head_dim) ** 2
        )
    return math.sqrt(variance)


def codec_report(spec: CodecSpec, distortions: torch.Tensor, bias: float) -> CodecReport:
    """The report of a measurement.

    Args:
        spec: the codec.
        distortions: [samples], the distortion of each vector.
        bias: the measured bias.
    """
    samples = distortions.numel()
    expected, expected_bias = expected_distortion(spec)
    parts = [(group.channels / spec.head_dim, group) for group in spec.groups]
    optimum = sum(part * lloyd_max_distortion(group.bits, group.channels) for part, group in parts)
    bound = sum(part * paper_mse_bound(group.bits) for part, group in parts)
    bounded = spec.estimator == "mse" and (spec.bits != 8 or spec.codebook == "lloyd_max")
    code_bits = sum(part * group.bits for part, group in parts) + (spec.estimator == "prod")
    return CodecReport(
        head_dim=spec.head_dim,
        samples=samples,
        bits_per_value=spec.bits_per_value,
        distortion=float(distortions.mean()),
        standard_error=max(float(distortions.std()), _spread(spec)) / math.sqrt(samples),
        expected=expected,
        optimum=optimum,
        shannon=shannon_distortion(code_bits),
        paper_bound=bound if bounded else None,
        bias=bias,
        expected_bias=expected_bias,
    )


def memory_report(
    spec: CodecSpec,
    context: int,
    layers: int,
    kv_heads: int,
    sink_tokens: int,
    recent_tokens: int,
    batch: int,
    dtype: torch.dtype,
) -> MemoryReport:
    """Count the bytes of a cache; see `TurboQuantCodec.memory_report`.

    Raises:
        InvalidInputError: a count is negative, or `context`, `layers`, `kv_heads` or `batch` is zero.
    """
    counts = {"context": context, "layers": layers, "kv_heads": kv_heads, "batch": batch}
    for name, count in counts.items():
        if count < 1:
            raise InvalidInputError(f"{name} must be at least 1, got {count}")
    if min(sink_tokens, recent_tokens) < 0:
        raise InvalidInputError(
            f"sink_tokens={sink_tokens} and recent_tokens={recent_tokens} must not be negative"
        )
    heads = batch * layers * kv_heads
    pages = max(0, context - sink_tokens - recent_tokens) // PAGE_TOKENS
    dense_tokens = context - pages * PAGE_TOKENS
    code_page = sum(page_bytes(group.bits, group.channels) for group in spec.groups)
    scalars = len(spec.groups)
    if spec.estimator == "prod":
        code_page += page_bytes(1, spec.head_dim)
        scalars += 1
    key_statistics = 2 * _STATISTIC_BYTES
    orders = 2 * _ORDER_BYTES if len(spec.groups) > 1 else 0
    metadata = key_statistics + orders if pages else _STATISTIC_BYTES
    return MemoryReport(
        context=context,
        packed_tokens=pages * PAGE_TOKENS,
        dense_tokens=dense_tokens,
        code_bytes=2 * heads * pages * code_page,
        scale_bytes=2 * heads * pages * PAGE_TOKENS * scalars * spec.torch_scale_dtype.itemsize,
        dense_bytes=2 * heads * dense_tokens * spec.head_dim * dtype.itemsize,
        metadata_bytes=heads * spec.head_dim * metadata,
        uncompressed_bytes=2 * heads * context * spec.head_dim * dtype.itemsize,
    )
