"""Scales that do not fit their dtype: they are found after encoding, and stored in float32 or refused.

float16 holds at most 65504. Below 2**-14 it loses a bit of precision with every halving, and a scale below
2**-25 becomes 0. The largest scale of a head decides: where it lies within these limits, the error of the
head's smaller scales is at most 2**-11 of the largest one, float16's error of any scale.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError
from quantpress.quantization.spec import CodecSpec

LARGEST = torch.finfo(torch.float16).max
LEAST = torch.finfo(torch.float16).tiny

Encode = Callable[[CodecSpec], dict[str, Tensor]]


def encode_in_range(encode: Encode, spec: CodecSpec) -> dict[str, Tensor]:
    """Encode, with scales in float32 where "auto" needs it.

    Args:
        encode: makes planes for `spec`, or for `spec` with another scale dtype.
        spec: the codec.

    Returns:
        The planes.

    Raises:
        InvalidInputError: a scale is too large for the dtype that the spec asks for ("auto": for float32).
    """
    planes = encode(spec)
    low, high = _range(planes)
    if spec.scale_dtype == "auto" and not LEAST <= low <= high < LARGEST:
        wide = encode(_in_float32(spec))
        low, high = _range(wide)
        if not LEAST <= low <= high < LARGEST:  # else it was a head of zeros
            planes = wide
    dtype = planes["scale0"].dtype
    if high >= torch.finfo(dtype).max:
        high = _range(encode(_in_float32(spec)))[1]
        raise InvalidInputError(
            f"a {spec.role} has a scale of {high:.4g}, but {dtype} holds less than "
            f"{torch.finfo(dtype).max:.5g}; "
            'use scale_dtype="float32", or look for what makes the model so large'
        )
    return planes


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
