"""Launches the Triton kernel that encodes with the 1-bit sketch ("prod"): support, settings and operands."""

from typing import Any

import torch
from torch import Tensor

from quantpress.deferred import judge, zero_flags
from quantpress.kept import kept
from quantpress.kernels.available import FUSED, has_tensor_memory, is_hopper
from quantpress.kernels.encode.sketch_kernel import encode_sketch_kernel
from quantpress.kernels.encode.triton_encode import (
    DTYPES,
    EncodeSettings,
    check_flag,
    encode_arguments,
    in_tile_order,
    is_roomy,
)
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes
from quantpress.kernels.quick import quick
from quantpress.kernels.rotation_matrix import halved, padded, rotation_matrix
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

MAX_CHANNELS = 128

BLOCK = 64
"""Most channels of x in one product with the rotation where shared memory is scarce."""

_POINTERS = ("x", "mean", "weight", "order", "flag")
_NUMBERS = ("stride_b", "stride_h", "stride_t", "heads", "pages", "per", "largest")
_CONSTANTS = ("RULE", "VALUES", "MEAN", "WEIGHT", "ORDER", "STAGES")
_OF_GROUP = ("BOOK", "C", "CP", "BK", "BITS", "HALVES")


def supports_sketch(x: Tensor, spec: CodecSpec) -> bool:
    """Whether the kernel takes this call: "prod", 16 or 32-bit vectors of up to 128 channels.

    From compute capability 10.0 on sums are in tensor memory, of which a rotation of more than 64 channels in
    two float16 matrices needs more than there is.
    """
    if spec.estimator != "prod" or spec.head_dim > MAX_CHANNELS or x.dtype not in DTYPES or x.dim() != 4:
        return False
    if not has_tensor_memory(x.device) or spec.head_dim <= MAX_CHANNELS // 2:
        return True
    return len(rotation_matrix(spec.rotation_of(0), x.device).halves) == 1


def sketch_settings(spec: CodecSpec, roomy: bool, hopper: bool) -> EncodeSettings:
    """How the kernel is launched.

    Args:
        spec: the codec.
        roomy: whether a program may have 160 KB of shared memory, and so keeps the sketch's matrix over its
            pages.
        hopper: whether four warps make a product (with eight, each half would make all of it), and two
            programs share a multiprocessor.
    """
    size = padded(spec.head_dim)
    block = size if roomy and not hopper else min(size, BLOCK)
    return EncodeSettings(warps=4 if hopper else 8, stages=1, pages=8, block=block)


def encode_sketch_triton(x: Tensor, spec: CodecSpec, transform: ChannelTransform) -> dict[str, Tensor]:
    """Quantize vectors with a sketch of the residual; see `quantpress.kernels.encode.encode_pages`.

    A coordinate within float32 rounding of a threshold may get another code than in the reference, and a sign
    another one where the projection is 0 but for rounding.
    """
    planes, flag = launch_sketch(x, spec, transform)
    judge(check_flag, flag)
    return planes


@torch.no_grad()
def launch_sketch(
    x: Tensor, spec: CodecSpec, transform: ChannelTransform, settings: EncodeSettings | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Encode without waiting for the device.

    Args:
        x: as for `encode_pages`.
        spec: as for `encode_pages`.
        transform: as for `encode_pages`.
        settings: of the launch; None: those of the device.

    Returns:
        The planes, and a flag [1] int32 that becomes 1 if x is not finite.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, tokens, dim = x.shape
    lead = batch, heads, tokens // PAGE_TOKENS
    planes: dict[str, Tensor] = {}
    for codes, numbers, bits in (("codes0", "scale0", spec.groups[0].bits), ("sketch", "residual", 1)):
        planes[codes] = x.new_empty(*lead, page_bytes(bits, dim), dtype=torch.uint8)
        planes[numbers] = x.new_empty(*lead, PAGE_TOKENS, dtype=spec.torch_scale_dtype)
    flag = zero_flags(1, x.device)
    if not x.numel():
        return planes, flag
    roomy = is_roomy(x.device)
    settings = settings or sketch_settings(spec, roomy, is_hopper(x.device))
    arguments = sketch_arguments(x, spec, transform, planes, flag, settings, roomy)
    grid = (-(-lead[2] // settings.pages), batch * heads)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            quick(encode_sketch_kernel)[grid](**arguments, num_warps=settings.warps, **FUSED)
    else:
        quick(encode_sketch_kernel)[grid](**arguments, **FUSED)
    return planes, flag


def sketch_arguments(
    x: Tensor,
    spec: CodecSpec,
    transform: ChannelTransform,
    planes: dict[str, Tensor],
    flag: Tensor,
    settings: EncodeSettings,
    held: bool,
) -> dict[str, Any]:
    """The arguments of `encode_sketch_kernel` by name.

    Args:
        x: as for `launch_sketch`.
        spec: as for `launch_sketch`.
        transform: as for `launch_sketch`.
        planes: written.
        flag: [1] int32 zero, written.
        settings: how the kernel is launched.
        held: whether a program keeps the sketch's matrix over all its pages.
    """
    given = encode_arguments(x, spec, transform, planes, flag, settings, device=False, direct=False)
    arguments = {f"{name}_ptr": given[f"{name}_ptr"] for name in _POINTERS}
    arguments |= {name: given[name] for name in (*_NUMBERS, *_CONSTANTS)}
    arguments |= {name: given[f"{name}0"] for name in _OF_GROUP}
    return arguments | {
        "matrix_ptr": given["matrix0_ptr"],
        "sketch_ptr": _sketch_operand(spec, x.device),
        "words_ptr": given["words0_ptr"],
        "scale_ptr": given["scale0_ptr"],
        "signs_ptr": planes["sketch"].view(torch.int32),
        "residual_ptr": planes["residual"],
        "factor": given["factor0"],
        "HELD": held,
    }


@kept
def _sketch_operand(spec: CodecSpec, device: torch.device) -> Tensor:
    """The sketch's matrix in two float16 parts, for residuals as a left operand; cached."""
    halves = halved(spec.sketch_matrix().T, device).halves
    if spec.role == "value":
        return halves
    return in_tile_order(in_tile_order(halves).mT).mT.contiguous()
