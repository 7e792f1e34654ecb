"""Launches the Triton kernels that decode pages: what they support, their settings and their operands."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from quantpress.kept import kept
from quantpress.kernels.available import FUSED
from quantpress.kernels.dequantize.triton_kernel import decode_code_space_kernel, decode_pages_kernel
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.rotation_matrix import RotationMatrix, halved, padded, rotation_matrix
from quantpress.quantization.codebook import Codebook
from quantpress.quantization.qjl import SQRT_HALF_PI
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

MAX_CHANNELS = 256  # of a group
BLOCK = 64  # channels in one product with the inverse rotation
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports_decode(spec: CodecSpec, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels take this codec and dtype: groups of up to 256 channels, no means."""
    fits = all(group.channels <= MAX_CHANNELS for group in spec.groups)
    return not spec.page_keys and fits and dtype in DTYPES


def decode_code_space_triton(planes: dict[str, Tensor], spec: CodecSpec) -> Tensor:
    """Decode pages into code space; see `quantpress.kernels.dequantize.decode_code_space`."""
    batch, heads, pages = planes["codes0"].shape[:3]
    tokens = pages * PAGE_TOKENS
    values = spec.role == "value"
    shape = (batch, heads, spec.head_dim, tokens) if values else (batch, heads, tokens, spec.head_dim)
    out = torch.empty(shape, dtype=torch.float32, device=planes["codes0"].device)
    for arguments in code_space_arguments(planes, spec, out):
        wide = arguments["SKETCH"] and arguments["CP"] > 128
        _launch(decode_code_space_kernel, arguments, batch * heads, 8 if wide else 4)
    return out.transpose(-1, -2) if values else out


def decode_pages_triton(
    planes: dict[str, Tensor], spec: CodecSpec, transform: ChannelTransform, dtype: torch.dtype
) -> Tensor:
    """Decode pages to vectors; see `quantpress.kernels.dequantize.decode_pages`."""
    batch, heads, pages = planes["codes0"].shape[:3]
    shape = (batch, heads, pages * PAGE_TOKENS, spec.head_dim)
    out = torch.empty(shape, dtype=dtype, device=planes["codes0"].device)
    for arguments in decode_arguments(planes, spec, transform, out):
        _launch(decode_pages_kernel, arguments, batch * heads, 4 if arguments["CP"] <= 128 else 8)
    return out


def decode_table_triton(
    planes: dict[str, Tensor], spec: CodecSpec, transform: ChannelTransform, table: Tensor, out: Tensor
) -> None:
    """Decode some pages of planes [1, Hkv, N, ...], which stay where they are; see `decode_arguments`."""
    for arguments in decode_arguments(planes, spec, transform, out, table):
        _launch(decode_pages_kernel, arguments, out.shape[1], 4 if arguments["CP"] <= 128 else 8)


def _launch(kernel: Any, arguments: dict[str, Any], heads: int, warps: int) -> None:
    out: Tensor = arguments["out_ptr"]
    if out.numel():
        with torch.cuda.device(out.device) if out.is_cuda else nullcontext():
            kernel[(2 * arguments["pages"], heads)](**arguments, num_warps=warps, **FUSED)


def code_space_arguments(planes: dict[str, Tensor], spec: CodecSpec, out: Tensor) -> Iterator[dict[str, Any]]:
    """The arguments of `decode_code_space_kernel` by name, for each channel group."""
    start = 0
    for i, group in enumerate(spec.groups):
        levels = _level_tensor(spec.codebook_of(i), out.device, False)
        common = _common(planes, spec, i, start)
        common |= _sketch(planes, spec, common["words_ptr"], turned=False)
        yield common | {"levels_ptr": levels, "out_ptr": out}
        start += group.channels


def decode_arguments(
    planes: dict[str, Tensor],
    spec: CodecSpec,
    transform: ChannelTransform,
    out: Tensor,
    table: Tensor | None = None,
) -> Iterator[dict[str, Any]]:
    """The arguments of `decode_pages_kernel` by name, for each channel group.

    Args:
        planes: [B, Hkv, N, ...]; with a table B is 1, and strides from head to head and page to page are any.
        spec: of the planes.
        transform: of the planes.
        out: [B, Hkv, T, D], written; heads and tokens equally far apart, channels contiguous.
        table: [P] int32, the pages to decode, T = 128 * P; None: all.
    """
    whole = transform.expanded(planes["codes0"].shape[0])
    parts = {name: part.contiguous() for name, part in whole.tensors().items()}
    start = 0
    for i, group in enumerate(spec.groups):
        book = spec.codebook_of(i)
        levels = _level_tensor(book, out.device, True)
        matrix = rotation_matrix(spec.rotation_of(i), out.device, inverse=True)
        copied = table is None
        common = _common(planes, spec, i, start, copied)
        common |= _sketch(planes, spec, common["words_ptr"], turned=True, copied=copied)
        steps = {
            f"{name}_{axis}": common[f"{name}_ptr"].stride(dim)
            for name in ("words", "scale", "signs", "residual")
            for dim, axis in ((1, "head"), (2, "page"))
        }
        yield common | {
            **steps,
            "levels_ptr": levels,
            "table_ptr": levels if table is None else table,
            "pages": common["pages"] if table is None else len(table),
            "out_head": out.stride(1),
            "out_token": out.stride(2),
            "TABLE": table is not None,
            "matrix_ptr": matrix.halves,
            "out_ptr": out,
            **{f"{name}_ptr": parts.get(name, levels) for name in ("mean", "weight", "order")},
            "factor": matrix.factor * book.unit,
            "HALVES": len(matrix.halves),
            "WHOLE": book.form == "int8",
            "MEAN": transform.mean is not None,
            "WEIGHT": transform.weight is not None,
            "ORDER": transform.order is not None,
        }
        start += group.channels


def _common(
    planes: dict[str, Tensor], spec: CodecSpec, i: int, start: int, copied: bool = True
) -> dict[str, Any]:
    group = spec.groups[i]
    codes, scale = planes[f"codes{i}"], planes[f"scale{i}"]
    return {
        "words_ptr": (codes.contiguous() if copied else codes).view(torch.int32),
        "scale_ptr": scale.contiguous() if copied else scale,
        "pages": planes["codes0"].shape[2],
        "D": spec.head_dim,
        "START": start,
        "C": group.channels,
        "CP": padded(group.channels),
        "BK": min(padded(group.channels), BLOCK),
        "BITS": group.bits,
        "VALUES": spec.role == "value",
    }


def _sketch(
    planes: dict[str, Tensor], spec: CodecSpec, none: Tensor, turned: bool, copied: bool = True
) -> dict[str, Any]:
    """The arguments of a sketch, which lead out of code space if `turned`; `none` in their place without."""
    if spec.estimator != "prod":
        pointers = dict.fromkeys(("signs_ptr", "residual_ptr", "turn_ptr"), none)
        return {**pointers, "turn_factor": 0.0, "SKETCH": False}
    signs, residual = (
        planes[name].contiguous() if copied else planes[name] for name in ("sketch", "residual")
    )
    turn = _sketch_turn(spec, none.device, turned)
    return {
        "signs_ptr": signs.view(torch.int32),
        "residual_ptr": residual,
        "turn_ptr": turn.halves,
        "turn_factor": turn.factor * SQRT_HALF_PI / spec.head_dim,
        "SKETCH": True,
    }


@kept
def _sketch_turn(spec: CodecSpec, device: torch.device, turned: bool) -> RotationMatrix:
    """The sketch's matrix, times the rotation if `turned`; cached."""
    matrix = spec.sketch_matrix()
    return halved(matrix @ spec.rotation_of(0).matrix() if turned else matrix, device)


@kept
def _level_tensor(book: Codebook, device: torch.device, scaled: bool) -> Tensor:
    """Levels of a codebook, in units of `book.unit` if `scaled`; cached."""
    return torch.tensor(book.scaled if scaled else book.levels, dtype=torch.float32, device=device)
