"""Launches the Hopper encode kernel: which calls it covers, its settings and its operands."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quantpress.kept import kept
from quantpress.kernels.available import FUSED, is_hopper
from quantpress.kernels.encode.octets import (
    GATHER_CONSTRAINTS,
    centre,
    gather_assembly,
    octet_assembly,
    octet_constraints,
    octet_table,
    steepness,
    sum_unit,
    zero_fields,
)
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.quick import quick
from quantpress.kernels.rotation_matrix import rotation_matrix
from quantpress.quantization.codebook import Codebook
from quantpress.quantization.rotation import Rotation
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

CHANNELS = 128
WIDTHS = (2, 3, 4)
RULES = {"key": "norm_corrected", "value": "unbiased"}
WARPS = 4

_ALIGNED = 16  # bytes that a thread copies at once; Triton must know that strides are multiples of it
_KEY_SHORT = 2.0**-4  # least norm of a key over the largest weight: float16 holds the numbers of longer ones
_PAIR_UNITS = {torch.bfloat16: 2.0**30, torch.float16: 2.0**10}  # of values' rotation at 2 bits
_PAIR_SHORT = 2.0**-16  # least norm of their product, so that sums with levels are normal float32 numbers
_VALUE_SHORT, _VALUE_LONG = 2.0**-40, 2.0**40  # norms of other values' products
_LONG = 2.0**60  # largest norm of other products


def covers(x: Tensor, spec: CodecSpec, transform: ChannelTransform) -> bool:
    """Whether the kernel takes this call: 2, 3 or 4 bits at head_dim 128, on sm_90.

    Args:
        x: [B, Hkv, T, D] 16-bit, channels contiguous, vectors at multiples of 16 bytes.
        spec: one channel group, int8 codebook, Hadamard rotation, and the default scale rule of its role.
        transform: mean and weight for keys only, no order.
    """
    codec = spec.head_dim == CHANNELS and spec.bits in WIDTHS and spec.estimator == "mse"
    codec = codec and spec.rotation == "hadamard" and spec.codebook == "int8"
    codec = codec and spec.scale_rule == RULES[spec.role]
    moved = transform.tensors().keys() <= ({"mean", "weight"} if spec.role == "key" else set())
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = x.stride(-1) == 1 and not any(step % _ALIGNED for step in steps) and not x.data_ptr() % _ALIGNED
    return codec and moved and aligned and x.dtype in _PAIR_UNITS and is_hopper(x.device)


def launch_settings(spec: CodecSpec) -> tuple[int, int]:
    """Most registers of a thread, and programs for each multiprocessor, whether or not all run at once."""
    if spec.role == "key":
        return 128, 4  # each program makes a matrix
    return (128, 8) if spec.bits == 3 else (96, 10)


def launch_hopper(
    x: Tensor, spec: CodecSpec, transform: ChannelTransform, planes: dict[str, Tensor], flag: Tensor
) -> None:
    """Launch the kernel.

    Args:
        x: as for `covers`, of at least one page.
        spec: as for `covers`.
        transform: as for `covers`.
        planes: "codes0" and "scale0", written.
        flag: [1] int32 zero; becomes 2 where x is out of range and `encode_pages_kernel` must encode it.
    """
    from quantpress.kernels.encode.hopper_kernel import encode_hopper_kernel

    heads = x.shape[0] * x.shape[1]
    pages = x.shape[2] // PAGE_TOKENS
    units = -(-pages // 2) if spec.bits == 3 else pages  # what one round of a program encodes
    registers, programs = launch_settings(spec)
    grid = (max(1, min(units, programs * _multiprocessors(x.device) // heads)), heads)
    arguments = hopper_arguments(x, spec, transform, planes, flag)
    arguments["turn"] = turn_of(grid[0], _multiprocessors(x.device))
    with torch.cuda.device(x.device):
        quick(encode_hopper_kernel)[grid](
            **arguments,
            num_warps=WARPS,
            maxnreg=registers,
            **FUSED,
        )


def turn_of(programs: int, multiprocessors: int) -> int:
    """Which bit of a head's number turns the order of its programs: 31, none, where a head fills the GPU.

    The first programs of a head have a page more than the last where pages do not come out even. Programs of
    as many heads as fill the GPU once lie on multiprocessors alike, so the next ones are numbered backwards.
    """
    heads = multiprocessors // programs
    return (heads - 1).bit_length() if heads else 31


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def hopper_arguments(
    x: Tensor, spec: CodecSpec, transform: ChannelTransform, planes: dict[str, Tensor], flag: Tensor
) -> dict[str, Any]:
    """The arguments of `encode_hopper_kernel` by name; see `launch_hopper`."""
    strides = {
        f"stride_{axis}": x.stride(i) if x.shape[i] > 1 else 0 for i, axis in enumerate(("b", "h", "t"))
    }
    parts = transform.contiguous(len(x))
    return _constants(spec, x.dtype, x.device) | {
        "x_ptr": x,
        "mean_ptr": parts.get("mean", flag),
        "weight_ptr": parts.get("weight", flag),
        "words_ptr": planes["codes0"].view(torch.int32),
        "scale_ptr": planes["scale0"],
        "flag_ptr": flag,
        **strides,
        "heads": x.shape[1],
        "pages": x.shape[2] // PAGE_TOKENS,
        "turn": 31,
        "MEAN": "mean" in parts,
        "WEIGHT": "weight" in parts,
    }


@lru_cache(maxsize=64)
def _constants(spec: CodecSpec, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments that are the same for every layer."""
    values, book = spec.role == "value", spec.codebook_of(0)
    zeros = zero_fields(book.bits, values)
    pairs = values and book.bits == 2
    unit = _PAIR_UNITS[dtype] if pairs else 1.0
    matrix, factor = _matrix(spec.rotation_of(0), values, dtype if values else torch.float16, unit, device)
    short = _PAIR_SHORT if pairs else _VALUE_SHORT if values else _KEY_SHORT / factor
    return {
        "matrix_ptr": matrix,
        "table_ptr": _table(book, values, device),
        "factor": factor / unit / (sum_unit(book, values) if values else book.unit),
        "largest": torch.finfo(spec.torch_scale_dtype).max,
        "least": short**2,
        "most": (_VALUE_LONG if values and not pairs else _LONG) ** 2,
        "ASM": octet_assembly(book, values),
        "REGISTERS": octet_constraints(book, values),
        "GATHER": gather_assembly(book.bits),
        "GATHER_REGISTERS": GATHER_CONSTRAINTS,
        "ZERO0": zeros[0],
        "ZERO1": zeros[1],
        "STEEP": steepness(book, values),
        "CENTRE": centre(book, values),
        "BITS": book.bits,
        "VALUES": values,
    }


@kept
def _matrix(
    rotation: Rotation, values: bool, dtype: torch.dtype, unit: float, device: torch.device
) -> tuple[Tensor, float]:
    """Half of the rotation times `unit`, columns as in the kernel's tiles, and the rotation's factor."""
    matrix = rotation_matrix(rotation, torch.device("cpu"))
    column = torch.arange(CHANNELS, device="cpu")
    o, e, t, s = column // 16, column // 8 % 2, column // 2 % 4, column % 2
    channel = 2 * e + s + (16 * o + 4 * t if values else 64 * (o // 4) + 16 * t + 4 * (o % 4))
    entries = (matrix.halves[0].float() * unit).to(dtype)
    return entries[:, channel[:64]].contiguous().to(device), matrix.factor


@kept
def _table(book: Codebook, values: bool, device: torch.device) -> Tensor:
    """[20] int32: each word of `octet_table` four times, once for each t."""
    words = [word for word in octet_table(book, values) for _ in range(4)]
    return torch.tensor(words, dtype=torch.int32, device="cpu").to(device)
