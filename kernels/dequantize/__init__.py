"""Decoding of pages: the public entries, and the seam where a device kernel goes in.

Code space is where decoding ends and attention works: channels permuted by the transform, rotated per group.
"""

import torch
from torch import Tensor

from quantpress.kernels.available import runs_triton
from quantpress.kernels.dequantize.reference import (
    check_planes,
    decode_code_space_reference,
    decode_pages_reference,
    from_code_space,
    to_code_space,
)
from quantpress.quantization.numerics import in_named_dtypes
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

__all__ = ["decode_code_space", "decode_pages", "from_code_space", "to_code_space"]


@in_named_dtypes
def decode_code_space(planes: dict[str, Tensor], spec: CodecSpec) -> Tensor:
    """Decode pages into code space, where q.x = to_code_space(query(q)) . y + bias(q).

    Args:
        planes: from `encode_pages` (views of whole pages will do), B x Hkv x P pages.
        spec: the codec that made them.

    Returns:
        [B, Hkv, T, D] float32, T = 128 * P: scale times level, groups side by side; for the "prod" estimator
        plus sqrt(pi / 2) / D * residual norm * (sketch signs @ sketch_matrix). Keys are contiguous, values
        are the transpose of a contiguous [B, Hkv, D, T], as in their pages.

    Raises:
        InvalidInputError: the planes are not this codec's.

    Source: TurboQuant, arXiv 2504.19874, Algorithms 1 and 2.
    """
    check_planes(planes, spec)
    if runs_triton(planes["codes0"].device):
        from quantpress.kernels.dequantize.triton_dequantize import decode_code_space_triton, supports_decode

        if supports_decode(spec):
            return decode_code_space_triton(planes, spec)
    return decode_code_space_reference(planes, spec)


@in_named_dtypes
def decode_pages(
    planes: dict[str, Tensor], spec: CodecSpec, transform: ChannelTransform, dtype: torch.dtype
) -> Tensor:
    """Decode pages to the vectors they stand for.

    Args:
        planes: from `encode_pages`, B x Hkv x P pages.
        spec: the codec that made them.
        transform: the transform they were encoded with.
        dtype: dtype of the result.

    Returns:
        [B, Hkv, 128 * P, D] `dtype`.

    Raises:
        InvalidInputError: the planes are not this codec's.
    """
    batch, heads, _ = check_planes(planes, spec)
    if runs_triton(planes["codes0"].device):
        from quantpress.kernels.dequantize.triton_dequantize import decode_pages_triton, supports_decode

        if supports_decode(spec, dtype):
            transform.invert(planes["scale0"].new_empty(batch, heads, 0, spec.head_dim))  # for its checks
            return decode_pages_triton(planes, spec, transform, dtype)
    return decode_pages_reference(planes, spec, transform, dtype)
