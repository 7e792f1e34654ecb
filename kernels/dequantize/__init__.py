"""Dequantizing pages: `decode_pages` and `decode_code_space`, which choose between kernels and plain PyTorch.

In `kernels` and `codecs`, to decode means to bring codes back to numbers, as opposed to `encode_pages`; it
never means the generation of tokens. In code space, where attention works, channels are permuted by the
transform and rotated per group.
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
        planes: what `encode_pages` returned, or views of whole pages of it; B x Hkv x P pages.
        spec: the codec that made them.

    Returns:
        [B, Hkv, T, D] float32, T = 128 * P: scale times level, groups side by side; for the "prod" estimator
        plus sqrt(pi / 2) / D * residual norm * (sketch signs @ sketch_matrix); with `page_keys` plus the
        rotated mean of the page, and the page's sink in its place. Keys are contiguous; values are the
        transpose of a contiguous [B, Hkv, D, T], as in their pages.

    Raises:
        InvalidInputError: the planes are not those of this codec.

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
    """Decode pages to vectors.

    Args:
        planes: what `encode_pages` returned, B x Hkv x P pages.
        spec: the codec that made them.
        transform: the transform that the vectors were encoded with.
        dtype: dtype of the result.

    Returns:
        [B, Hkv, 128 * P, D] `dtype`.

    Raises:
        InvalidInputError: the planes are not those of this codec.
    """
    batch, heads, _ = check_planes(planes, spec)
    if runs_triton(planes["codes0"].device):
        from quantpress.kernels.dequantize.triton_dequantize import decode_pages_triton, supports_decode

        if supports_decode(spec, dtype):
            transform.invert(planes["scale0"].new_empty(batch, heads, 0, spec.head_dim))  # for its checks
            return decode_pages_triton(planes, spec, transform, dtype)
    return decode_pages_reference(planes, spec, transform, dtype)
