"""Encoding of vectors into pages: `encode_pages`, which chooses between the kernels and plain PyTorch.

Scales that do not fit their dtype are found after encoding, and stored in float32 or refused. float16 holds
at most 65504. Below 2**-14 it loses a bit of precision with every halving, and a scale below 2**-25
becomes 0. The largest scale of a head decides: where it lies within these limits, the error of the head's
smaller scales is at most 2**-11 of the largest one, float16's error of any scale.

Where checks are deferred (`quantpress.deferred`), scales of dtype "auto" are in float32 at
first. The verdict says which of them fit into float16, and whoever keeps them converts them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from quantpress.deferred import DeferredChecks, deferred_checks, judge
from quantpress.errors import InvalidInputError
from quantpress.kernels.available import runs_triton
from quantpress.kernels.encode.reference import check_vectors, encode_pages_reference
from quantpress.quantization.numerics import in_named_dtypes
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

__all__ = ["encode_pages"]

_LARGEST = torch.finfo(torch.float16).max
_LEAST = torch.finfo(torch.float16).tiny

_Encode = Callable[[CodecSpec], dict[str, Tensor]]


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
        the spec's scale dtype; for "auto" float16 where it holds the scales, else float32 (float32 until
        deferred checks are settled). The "prod"
        estimator adds "sketch" [B, Hkv, P, page_bytes(1, D)] uint8, with code 1 where sketch_matrix @ r >= 0
        for the residual r = y - s * c, and "residual" [B, Hkv, P, 128], |r|. A zero vector has scale 0. With
        `page_keys` there are "mean0" and "sink0" [B, Hkv, P, D] in the dtype of the scales: the mean of each
        page's transformed vectors, without which the vectors above are, and the transformed vector furthest
        from it, whose scale is -1.

    Raises:
        InvalidInputError: x has the wrong shape or dtype, or a scale is too large for the dtype that the spec
            asks for ("auto": for float32).
        NonFiniteError: x holds NaN or infinity.

    Source: TurboQuant, arXiv 2504.19874, Algorithms 1 and 2.
    """
    check_vectors(x, spec, transform)
    return in_range(lambda stored: _encode(x, stored, transform), spec)


def _encode(x: Tensor, spec: CodecSpec, transform: ChannelTransform) -> dict[str, Tensor]:
    if runs_triton(x.device):
        from quantpress.kernels.encode.sketch_encode import encode_sketch_triton, supports_sketch
        from quantpress.kernels.encode.triton_encode import encode_pages_triton, supports_encode

        if supports_encode(x, spec):
            return encode_pages_triton(x, spec, transform)
        if supports_sketch(x, spec):
            return encode_sketch_triton(x, spec, transform)
    return encode_pages_reference(x, spec, transform)


def in_range(encode: _Encode, spec: CodecSpec) -> dict[str, Tensor]:
    """Planes of `encode` for the spec, with scales in float32 where "auto" needs them."""
    checks = deferred_checks()
    if checks is not None and spec.scale_dtype == "auto" and spec.estimator == "mse" and not spec.page_keys:
        return _wide(encode(_in_float32(spec)), spec, checks)
    planes = encode(spec)
    low, high = _range(planes)
    if spec.scale_dtype == "auto" and not _LEAST <= low <= high < _LARGEST:
        wide = encode(_in_float32(spec))
        low, high = _range(wide)
        if not _LEAST <= low <= high < _LARGEST:  # else it was a head of zeros
            planes = wide
    dtype = planes["scale0"].dtype
    if high >= torch.finfo(dtype).max:
        raise _too_large(_range(encode(_in_float32(spec)))[1], dtype, spec)
    return planes


def _wide(planes: dict[str, Tensor], spec: CodecSpec, checks: DeferredChecks) -> dict[str, Tensor]:
    """Planes with scales in float32, of which `checks` will know whether they fit into float16."""
    scales = [plane for name, plane in planes.items() if name.startswith("scale")]

    def verdict(tops: list[float]) -> None:
        tops = [top for top in tops if top > 0] or [1.0]  # heads of zeros do not count
        if min(tops) >= _LEAST and max(tops) < _LARGEST:
            checks.narrow(scales)
        elif max(tops) >= torch.finfo(torch.float32).max:
            raise _too_large(max(tops), torch.float32, spec)

    if scales[0].numel():
        checks.hold(scales)
        judge(verdict, *(scale.amax(dim=(2, 3)) for scale in scales))
    return planes


def _too_large(scale: float, dtype: torch.dtype, spec: CodecSpec) -> InvalidInputError:
    return InvalidInputError(
        f"a {spec.role} has a scale of {scale:.4g}, but {dtype} holds less than "
        f"{torch.finfo(dtype).max:.5g}; "
        'use scale_dtype="float32", or look for what makes the model so large'
    )


def _range(planes: dict[str, Tensor]) -> tuple[float, float]:
    """The least and the largest of the heads' largest scales.

    Heads of zeros do not count where scales are float32; in float16 a scale of 0 may be one that has
    vanished.
    """
    scales = [plane for name, plane in planes.items() if name.startswith("scale")]
    if not scales[0].numel():
        return 1.0, 1.0
    tops = torch.stack([scale.amax(dim=(2, 3)) for scale in scales])
    if tops.dtype == torch.float32:
        tops = tops.where(tops > 0, 1.0)
    low, high = torch.stack(torch.aminmax(tops)).tolist()  # waits for the device, once
    return low, high


@lru_cache(maxsize=64)
def _in_float32(spec: CodecSpec) -> CodecSpec:
    return replace(spec, scale_dtype="float32")
