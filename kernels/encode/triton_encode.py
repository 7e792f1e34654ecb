"""Launches the Triton encode kernel: what it supports, its settings and its operands.

On Hopper, calls that `hopper_encode.covers` go to the Hopper kernel, and come here where they are out of its
range.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantpress.deferred import deferred_checks, judge, zero_flags
from quantpress.errors import NonFiniteError
from quantpress.kept import kept
from quantpress.kernels.available import FUSED, has_tensor_memory
from quantpress.kernels.encode.assembly import rounding_assembly, squares_assembly, summand_unit
from quantpress.kernels.encode.hopper_encode import covers, launch_hopper
from quantpress.kernels.encode.nearest import nearest_level
from quantpress.kernels.encode.triton_kernel import CAREFUL, QUICK, QUICK_UNIT, RAW, encode_pages_kernel
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes
from quantpress.kernels.quick import quick
from quantpress.kernels.rotation_matrix import RotationMatrix, padded, rotation_matrix
from quantpress.quantization.codebook import Codebook
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

MAX_CHANNELS = 256
"""Most channels of a group."""

MAX_IN_TENSOR_MEMORY = 128
"""The same where sums are in tensor memory (10.0): those of wider groups ask for more than there is."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ASSEMBLED = (2, 3, 4)
ROOMY_BYTES = 160 * 1024
RAW_UNIT = 2.0**20  # factor of the matrix for raw bfloat16, for norms between 2**-80 and 2**30
OUT_OF_RANGE = 2
RULES = {"norm": 0, "norm_corrected": 1, "unbiased": 2}
_PART_POINTERS = ("mean_ptr", "weight_ptr", "order_ptr")


@dataclass(frozen=True)
class EncodeSettings:
    """How the kernel is launched.

    Args:
        warps: warps per program.
        stages: depth of the software pipeline over pages.
        pages: pages per program, which loads the rotation once for all of them.
        block: channels of x in one product with the rotation.
        registers: most registers per thread; None for no limit.
    """

    warps: int
    stages: int
    pages: int
    block: int
    registers: int | None = None


def encode_settings(x: Tensor, spec: CodecSpec, roomy: bool) -> EncodeSettings:
    """The settings that were fastest on an H100 at 128 channels.

    Args:
        x: the vectors.
        spec: the codec.
        roomy: whether a program may have 160 KB of shared memory (sm_80, sm_90, sm_100), so that the next
            page's vectors are loaded while one is encoded.
    """
    if max(group.channels for group in spec.groups) > 128:
        return EncodeSettings(warps=8, stages=1, pages=4, block=64)
    ahead = roomy and len(spec.groups) == 1 and x.element_size() == 2 and spec.head_dim in (64, 128)
    if spec.bits == 8 and spec.codebook != "int8":
        ahead = False  # Triton 3.6 fails to pipeline a loop that looks levels up in a table
    crowded = ahead and spec.role == "key" and spec.bits in (2, 4)  # three programs share a multiprocessor
    return EncodeSettings(
        warps=4, stages=2 if ahead else 1, pages=4, block=128, registers=168 if crowded else None
    )


@lru_cache(maxsize=16)
def is_roomy(device: torch.device) -> bool:
    """Whether a program may have 160 KB of shared memory."""
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= ROOMY_BYTES)


def supports_encode(x: Tensor, spec: CodecSpec) -> bool:
    """Whether the kernel takes this call: 16 or 32-bit vectors, codes alone, groups that are not too wide."""
    most = MAX_IN_TENSOR_MEMORY if has_tensor_memory(x.device) else MAX_CHANNELS
    fits = all(group.channels <= most for group in spec.groups)
    return spec.estimator == "mse" and not spec.page_keys and fits and x.dtype in DTYPES and x.dim() == 4


def encode_pages_triton(x: Tensor, spec: CodecSpec, transform: ChannelTransform) -> dict[str, Tensor]:
    """Quantize vectors and pack their codes into pages; see `quantpress.kernels.encode.encode_pages`.

    A coordinate within float32 rounding of a threshold may get another code than in the reference.
    """
    planes, flag = launch_encode(x, spec, transform)
    if deferred_checks() is not None:
        again = zero_flags(1, flag.device)
        if x.numel():
            _launch_for_all(x, spec, transform, planes, again, direct=False, after=flag)
        judge(check_flag, again)
    elif int(flag) == OUT_OF_RANGE:
        planes, flag = launch_encode(x, spec, transform, direct=False)
        check_flag([int(flag)])
    return planes


def check_flag(flag: list[float]) -> None:
    """Refuse vectors by the flag of the launch that takes any range: it is 1 where one is not finite."""
    if any(flag):
        raise NonFiniteError("vectors to encode hold NaN or infinity, or overflow in the channel transform")


@torch.no_grad()
def launch_encode(
    x: Tensor,
    spec: CodecSpec,
    transform: ChannelTransform,
    settings: EncodeSettings | None = None,
    direct: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """Encode without waiting for the device.

    Args:
        x: as for `encode_pages`.
        spec: as for `encode_pages`.
        transform: as for `encode_pages`.
        settings: launch the kernel for all GPUs with these settings; None: choose the kernel and its
            settings.
        direct: whether the modes for vectors of ordinary length may be used.

    Returns:
        The planes, and a flag [1] int32. The planes are valid if the flag becomes 0; at 1 x is not finite, at
        2 it must be encoded again with direct=False.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, tokens, _ = x.shape
    pages = tokens // PAGE_TOKENS
    planes: dict[str, Tensor] = {}
    for i, group in enumerate(spec.groups):
        size = page_bytes(group.bits, group.channels)
        planes[f"codes{i}"] = x.new_empty(batch, heads, pages, size, dtype=torch.uint8)
        planes[f"scale{i}"] = x.new_empty(batch, heads, pages, PAGE_TOKENS, dtype=spec.torch_scale_dtype)
    flag = zero_flags(1, x.device)
    if pages * batch * heads == 0:
        return planes, flag
    if direct and settings is None and covers(x, spec, transform):
        launch_hopper(x, spec, transform, planes, flag)
    else:
        _launch_for_all(x, spec, transform, planes, flag, settings, direct)
    return planes, flag


@torch.no_grad()
def _launch_for_all(
    x: Tensor,
    spec: CodecSpec,
    transform: ChannelTransform,
    planes: dict[str, Tensor],
    flag: Tensor,
    settings: EncodeSettings | None = None,
    direct: bool = True,
    after: Tensor | None = None,
) -> None:
    """Launch the kernel for all GPUs; with the flag of another launch `after`, it works only if that is 2."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    settings = settings or encode_settings(x, spec, is_roomy(x.device))
    grid = (-(-(x.shape[2] // PAGE_TOKENS) // settings.pages), x.shape[0] * x.shape[1])
    arguments = encode_arguments(x, spec, transform, planes, flag, settings, x.is_cuda, direct)
    if after is not None:
        arguments |= {"after_ptr": after, "AFTER": True}
    if x.is_cuda:
        with torch.cuda.device(x.device):
            limits = {"num_warps": settings.warps, "maxnreg": settings.registers}
            quick(encode_pages_kernel)[grid](**arguments, **limits, **FUSED)
    else:
        quick(encode_pages_kernel)[grid](**arguments, **FUSED)


def encode_arguments(
    x: Tensor,
    spec: CodecSpec,
    transform: ChannelTransform,
    planes: dict[str, Tensor],
    flag: Tensor,
    settings: EncodeSettings,
    device: bool,
    direct: bool = True,
) -> dict[str, Any]:
    """The arguments of `encode_pages_kernel` by name.

    Args:
        x: as for `launch_encode`.
        spec: as for `launch_encode`.
        transform: as for `launch_encode`.
        planes: written.
        flag: [1] int32 zero, written.
        settings: how the kernel is launched.
        device: whether the kernel runs on a GPU, not in the interpreter.
        direct: as for `launch_encode`.

    Returns:
        The arguments; without a second channel group the first one's are repeated.
    """
    moved = transform.mean is not None or transform.weight is not None
    parts = transform.contiguous(len(x))
    arguments: dict[str, Any] = {name: parts.get(name[:-4], flag) for name in _PART_POINTERS}
    arguments |= _constants(spec, x.dtype, x.device, settings, moved, device, direct)
    words = [planes[f"codes{i}"].view(torch.int32) for i in range(len(spec.groups))]
    for i in range(2):
        at = min(i, len(words) - 1)
        arguments.setdefault(f"table{i}_ptr", flag)
        arguments[f"words{i}_ptr"], arguments[f"scale{i}_ptr"] = words[at], planes[f"scale{at}"]
    return arguments | {
        "x_ptr": x,
        "flag_ptr": flag,
        "after_ptr": flag,
        "stride_b": x.stride(0),
        "stride_h": x.stride(1),
        "stride_t": x.stride(2),
        "heads": x.shape[1],
        "pages": x.shape[2] // PAGE_TOKENS,
        "MEAN": transform.mean is not None,
        "WEIGHT": transform.weight is not None,
        "ORDER": transform.order is not None,
        "AFTER": False,
    }


@lru_cache(maxsize=256)
def _constants(
    spec: CodecSpec,
    dtype: torch.dtype,
    place: torch.device,
    settings: EncodeSettings,
    moved: bool,
    device: bool,
    direct: bool,
) -> dict[str, Any]:
    """The arguments that are the same for every layer; `moved`: whether there is a mean or a weight."""
    values = spec.role == "value"
    matrices = [rotation_matrix(spec.rotation_of(i), place) for i in range(len(spec.groups))]
    whole = all(len(matrix.halves) == 1 for matrix in matrices) and not moved
    raw = direct and whole and dtype != torch.float32 and (device or dtype == torch.float16)
    mode = (RAW if raw else QUICK).value if direct else CAREFUL.value
    unit = RAW_UNIT if raw and dtype == torch.bfloat16 else 1.0
    scaled = QUICK_UNIT.value if mode == QUICK.value else 1.0
    arguments: dict[str, Any] = {
        "per": settings.pages,
        "largest": torch.finfo(spec.torch_scale_dtype).max,
        "RULE": RULES[spec.scale_rule],
        "MODE": mode,
        "VALUES": values,
        "STAGES": settings.stages,
    }
    for i in range(2):
        at = min(i, len(spec.groups) - 1)
        group, matrix, book = spec.groups[at], matrices[at], spec.codebook_of(at)
        rounding, squares, sum_unit = _assembly(book, spec) if device else ("", "", 1.0)
        size, cells = padded(group.channels), 1
        if book.bits == 8 and book.form != "int8":
            arguments[f"table{i}_ptr"], cells = _grid_table(book, place)
        arguments |= {
            f"matrix{i}_ptr": _operand(matrix, values, dtype if raw else torch.float16, unit),
            f"cells{i}": cells,
            f"factor{i}": matrix.factor / unit / scaled,
            f"BOOK{i}": positive_book(book),
            f"ASM{i}": rounding,
            f"SQUARES{i}": squares,
            f"UNIT{i}": sum_unit,
            f"C{i}": group.channels if i < len(spec.groups) else 0,
            f"CP{i}": size,
            f"BK{i}": min(size, settings.block),
            f"BITS{i}": group.bits,
            f"HALVES{i}": matrix.halves.shape[0],
        }
    return arguments


def positive_book(book: Codebook) -> tuple[float, ...]:
    """The positive thresholds and levels of a codebook, constants of the kernel.

    At 8 bits the inverse gap between levels, and half the gap; none where levels are not evenly spaced.
    """
    if book.bits == 8:
        return (1 / (2 * book.unit), book.unit) if book.form == "int8" else ()
    half = len(book.levels) // 2
    return book.thresholds[half:] + book.levels[half:]


def _assembly(book: Codebook, spec: CodecSpec) -> tuple[str, str, float]:
    """Assembly for rounding and for sums of squared levels, each empty where not used, and the sum's unit."""
    if book.bits not in ASSEMBLED:
        return "", "", 1.0
    if spec.role == "key" and spec.scale_rule == "norm_corrected":
        squares, unit = squares_assembly(book)
        if squares:
            return rounding_assembly(book, "norm"), squares, unit
    return rounding_assembly(book, spec.scale_rule), "", summand_unit(book, spec.scale_rule)


@kept
def _grid_table(book: Codebook, device: torch.device) -> tuple[Tensor, int]:
    nearest = nearest_level(book, torch.device("cpu"))
    ends = nearest.levels.new_tensor([nearest.origin, nearest.pitch])
    table = torch.cat((nearest.thresholds, nearest.levels, ends, nearest.first.float()))
    return table.to(device), len(nearest.first)


@kept
def _operand(matrix: RotationMatrix, values: bool, dtype: torch.dtype, unit: float) -> Tensor:
    """The rotation matrix times `unit`, its columns in the order of the kernel's tiles; cached."""
    halves = (matrix.halves.float() * unit).to(dtype)
    if values:
        return halves
    return in_tile_order(halves).contiguous()


def in_tile_order(matrix: Tensor) -> Tensor:
    """A matrix [..., CP] with its columns in the order of the kernel's tiles of keys."""
    column = torch.arange(matrix.shape[-1], device=matrix.device)
    channel = column // 16 * 16 + 4 * (column // 2 % 4) + 2 * (column // 8 % 2) + column % 2
    return matrix[..., channel]
