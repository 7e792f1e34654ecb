"""What a codec says about itself: how exact it measured, and what a cache would weigh."""

import math
from dataclasses import dataclass

import torch

from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes
from quantpress.quantization.bounds import lloyd_max_distortion, paper_mse_bound, shannon_distortion
from quantpress.quantization.spec import CodecSpec

BIAS_ROOM = 1e-3  # absolute; a rounded scale and a finite sample move the bias even of very fine codes

_STATISTIC_BYTES = 4  # mean and weight are float32
_ORDER_BYTES = 2  # a channel order is int16


@dataclass(frozen=True)
class CodecReport:
    """A codec measured on random vectors of uniform direction. Distortions are E|x - x^|^2 / |x|^2.

    Args:
        head_dim: D of the vectors.
        samples: how many vectors were measured.
        bits_per_value: true stored bits per coordinate, scales included.
        distortion: measured through encode and decode, the mean over the samples.
        standard_error: of that mean. Of 8 bits few coordinates, beyond the last level, make most of it.
        expected: what the codec's own codebooks, scale rule and estimator should give.
        optimum: of the best scalar codebook (Lloyd-Max) with as many code bits in each channel group.
        shannon: what no code of as many code bits per coordinate can beat in high dimension.
        paper_bound: sqrt(3) pi / 2 * 4^-bits, the upper bound in TurboQuant's Theorem 1, of each channel
            group and weighted by its channels; None with a sketch, to which it does not apply.
        bias: measured E<x, x^> / |x|^2 - 1, the shrinkage of inner products.
        expected_bias: what it should be; 0 for unbiased codes.
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
        """Relative deviation of the distortion that theory (up to O(1 / D)) and sampling leave room for."""
        return 0.02 + 4 / self.head_dim + 5 * self.standard_error / self.expected

    @property
    def ok(self) -> bool:
        """True when distortion and bias are what they should be."""
        room = self.tolerance * self.expected
        right_length = abs(self.bias - self.expected_bias) <= room + BIAS_ROOM
        return abs(self.distortion - self.expected) <= room and right_length


@dataclass(frozen=True)
class MemoryReport:
    """The bytes of a cache whose keys and values both have one codec's format.

    Args:
        context: tokens cached per sequence.
        packed_tokens: those in whole packed pages.
        dense_tokens: those in the model's own dtype: sinks, recent ones, and what does not fill a page.
        code_bytes: packed codes (and sketches).
        scale_bytes: scales (and residual norms).
        dense_bytes: those tokens.
        metadata_bytes: mean key and channel weights per head, and channel orders where there are two groups;
            before the first page the query moment that the weights will be made of.
        uncompressed_bytes: the same cache uncompressed, in the model's own dtype.
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
        """All bytes kept."""
        return self.code_bytes + self.scale_bytes + self.dense_bytes + self.metadata_bytes

    @property
    def ratio(self) -> float:
        """Uncompressed bytes over bytes kept."""
        return self.uncompressed_bytes / self.total_bytes


def expected_distortion(spec: CodecSpec) -> tuple[float, float]:
    """Distortion and bias that a codec should show on vectors of uniform direction.

    Let d be the plain distortion of the code l of a unit vector u. Levels that are centroids have
    E|l|^2 = E<u, l> = 1 - d. Up to O(1 / D) that gives

        "norm"            distortion d                   bias -d
        "norm_corrected"  distortion 2 - 2 sqrt(1 - d)   bias sqrt(1 - d) - 1
        "unbiased"        distortion d / (1 - d)         bias 0

    A sketch puts an error of (pi / 2 - 1 / D) |r|^2 in place of the residual's |r|^2 and takes the bias away.

    Returns:
        (distortion, bias), both relative to |x|^2.
    """
    distortion = bias = 0.0
    rounding = torch.finfo(spec.torch_scale_dtype).eps ** 2 / 24  # of the scale; its mean over a binade
    for i, group in enumerate(spec.groups):
        share = group.channels / spec.head_dim
        plain = spec.codebook_of(i).distortion
        shrunk = math.sqrt(1 - plain)
        if spec.scale_rule == "norm":
            error, shift = plain, -plain
        elif spec.scale_rule == "norm_corrected":
            error, shift = 2 - 2 * shrunk, shrunk - 1
        else:
            error, shift = plain / (1 - plain), 0.0
        distortion += share * (error + rounding)
        bias += share * shift
    if spec.estimator == "prod":
        return distortion * (math.pi / 2 - 1 / spec.head_dim), 0.0
    return distortion, bias


def codec_report(spec: CodecSpec, distortions: torch.Tensor, bias: float) -> CodecReport:
    """Put measured figures beside what they should be; distortions [samples], one of each vector."""
    samples = distortions.numel()
    expected, expected_bias = expected_distortion(spec)
    shares = [(group.channels / spec.head_dim, group) for group in spec.groups]
    optimum = sum(share * lloyd_max_distortion(group.bits, group.channels) for share, group in shares)
    bound = sum(share * paper_mse_bound(group.bits) for share, group in shares)
    code_bits = sum(share * group.bits for share, group in shares) + (spec.estimator == "prod")
    return CodecReport(
        head_dim=spec.head_dim,
        samples=samples,
        bits_per_value=spec.bits_per_value,
        distortion=float(distortions.mean()),
        standard_error=float(distortions.std()) / math.sqrt(samples),
        expected=expected,
        optimum=optimum,
        shannon=shannon_distortion(code_bits),
        paper_bound=bound if spec.estimator == "mse" else None,
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
    """Weigh a cache whose keys and values both have this codec's format.

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
