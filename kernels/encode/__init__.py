"""Encoding of vectors into pages: `encode_pages`, which chooses between the kernels and plain PyTorch."""

from torch import Tensor

from quantpress.kernels.available import runs_triton
from quantpress.kernels.encode.reference import check_vectors, encode_pages_reference
from quantpress.kernels.encode.scale_range import encode_in_range
from quantpress.quantization.numerics import in_named_dtypes
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

__all__ = ["encode_pages"]


@in_named_dtypes
def encode_pages(x: Tensor, spec: CodecSpec, transform: ChannelTransform) -> dict[str, Tensor]:
    """Quantize vectors and pack their codes into pages.

    For each channel group of y = rotate(transform.apply(x)), the coordinates of u = y / |y| are rounded to
    their nearest levels c, and one scale s is stored per vector, so that s * c stands for y:

        "norm"            s = |y|                  TurboQuant as published
        "norm_corrected"  s = |y| / |c|            the decoded vector has the norm of y
        "unbiased"        s = |y|^2 / <y, c>       <y, s * c> = |y|^2

    Args:
        x: [B, Hkv, T, D] floating; T is a multiple of `PAGE_TOKENS` and makes P = T / PAGE_TOKENS pages.
        spec: the codec; D is its `head_dim`.
        transform: channel transform of each [B, Hkv], applied first.

    Returns:
        For each channel group i, "codes{i}" [B, Hkv, P, page_bytes] uint8 and "scale{i}" [B, Hkv, P, 128] in
        the spec's scale dtype; for "auto" float16 where it holds the scales, else float32. The "prod"
        estimator adds "sketch" [B, Hkv, P, page_bytes(1, D)] uint8, with code 1 where sketch_matrix @ r >= 0
        for the residual r = y - s * c, and "residual" [B, Hkv, P, 128], |r|. A zero vector has scale 0.

    Raises:
        InvalidInputError: x has the wrong shape or dtype, or a scale is too large for the dtype that the spec
            asks for ("auto": for float32).
        NonFiniteError: x holds NaN or infinity.

    Source: TurboQuant, arXiv 2504.19874, Algorithms 1 and 2.
    """
    check_vectors(x, spec, transform)
    return encode_in_range(lambda stored: _encode(x, stored, transform), spec)


def _encode(x: Tensor, spec: CodecSpec, transform: ChannelTransform) -> dict[str, Tensor]:
    if runs_triton(x.device):
        from quantpress.kernels.encode.triton_encode import encode_pages_triton, supports_encode

        if supports_encode(x, spec):
            return encode_pages_triton(x, spec, transform)
    return encode_pages_reference(x, spec, transform)
