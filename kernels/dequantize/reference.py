"""Decoding in plain PyTorch: the truth that the kernels are held to, and what a CPU runs.

A table lookup makes float32 levels of four codes at a time (`read_pages`); another pass multiplies them by
their scales and writes them to the result. Chunks keep the workspace in a core's cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError
from quantpress.kept import kept
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes, page_table, read_pages
from quantpress.quantization.codebook import Codebook
from quantpress.quantization.numerics import exact_product
from quantpress.quantization.qjl import SQRT_HALF_PI
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

WORKSPACE_VALUES = 1 << 19  # coordinates decoded at a time


def decode_code_space_reference(planes: dict[str, Tensor], spec: CodecSpec) -> Tensor:
    """Decode pages into code space; see `quantpress.kernels.dequantize.decode_code_space`."""
    batch, heads, pages = check_planes(planes, spec)
    device = planes["codes0"].device
    rows, dim = batch * heads, spec.head_dim
    if spec.role == "key":
        out = torch.empty(rows, pages, PAGE_TOKENS, dim, dtype=torch.float32, device=device)
        result = out.view(batch, heads, pages * PAGE_TOKENS, dim)
    else:
        store = torch.empty(rows, dim, pages, PAGE_TOKENS, dtype=torch.float32, device=device)
        out = store.permute(0, 2, 3, 1)
        result = store.view(batch, heads, dim, pages * PAGE_TOKENS).transpose(-1, -2)
    start = 0
    for i, group in enumerate(spec.groups):
        table = level_table(spec.codebook_of(i), device)
        target = out[..., start : start + group.channels]
        _decode_plane(planes[f"codes{i}"], planes[f"scale{i}"], table, group.bits, spec.role, target)
        start += group.channels
    if spec.estimator == "prod":
        signs = torch.empty_like(out)  # times the residual norm
        _decode_plane(planes["sketch"], planes["residual"], sign_table(device), 1, spec.role, signs)
        sketched = exact_product(signs, spec.sketch_matrix(device, torch.float32))
        out += sketched.mul_(SQRT_HALF_PI / spec.head_dim)
    if spec.page_keys:
        turned = (spec.rotation_of(0).forward(planes[name].flatten(0, 1)) for name in ("mean0", "sink0"))
        mean, sink = (keys.unsqueeze(-2) for keys in turned)  # [rows, P, 1, D]
        out += mean
        torch.where((planes["scale0"] < 0).flatten(0, 1).unsqueeze(-1), sink, out, out=out)
    return result


def to_code_space(q: Tensor, spec: CodecSpec) -> Tensor:
    """Rotate each channel group: [..., D] floating, already transformed -> [..., D] float32."""
    return _by_group(q, spec, lambda part, i: spec.rotation_of(i).forward(part))


def from_code_space(y: Tensor, spec: CodecSpec) -> Tensor:
    """Undo `to_code_space`: [..., D] floating -> [..., D] float32."""
    return _by_group(y, spec, lambda part, i: spec.rotation_of(i).inverse(part))


def decode_pages_reference(
    planes: dict[str, Tensor], spec: CodecSpec, transform: ChannelTransform, dtype: torch.dtype
) -> Tensor:
    """Decode pages to vectors; see `quantpress.kernels.dequantize.decode_pages`."""
    return transform.invert(from_code_space(decode_code_space_reference(planes, spec), spec)).to(dtype)


def _decode_plane(packed: Tensor, scale: Tensor, table: Tensor, bits: int, role: str, out: Tensor) -> None:
    """Write scale * level to `out`.

    Args:
        packed: [B, Hkv, P, page_bytes] uint8.
        scale: [B, Hkv, P, 128] floating.
        table: levels, as `page_table` makes them.
        bits: code width.
        role: "key" or "value".
        out: [B * Hkv, P, 128, C] float32, any strides.
    """
    rows, pages, _, channels = out.shape
    packed, scale = packed.flatten(0, 1), scale.flatten(0, 1)
    budget = max(1, WORKSPACE_VALUES // (PAGE_TOKENS * channels))
    wide = max(1, min(pages, budget))
    tall = max(1, budget // wide) if wide == pages else 1
    for row in range(0, rows, tall):
        for column in range(0, pages, wide):
            at = slice(row, row + tall), slice(column, column + wide)
            levels = read_pages(packed[at], table, bits, channels, role)
            factor = scale[at].float().view(*levels.shape[:4], 1)  # [rows, pages, parts, 128 / parts, 1]
            torch.mul(levels, factor, out=out[at].view(levels.shape))


def _by_group(x: Tensor, spec: CodecSpec, turn: Callable[[Tensor, int], Tensor]) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != spec.head_dim or not x.is_floating_point():
        raise InvalidInputError(f"expected floating [..., {spec.head_dim}], got {x.dtype} {tuple(x.shape)}")
    parts = torch.split(x.float(), [group.channels for group in spec.groups], dim=-1)
    turned = [turn(part, i) for i, part in enumerate(parts)]
    return turned[0] if len(turned) == 1 else torch.cat(turned, dim=-1)


def check_planes(planes: dict[str, Tensor], spec: CodecSpec) -> tuple[int, int, int]:
    """Check that planes have the names and shapes of a codec.

    Returns:
        (B, Hkv, P).

    Raises:
        InvalidInputError: a name or a shape is wrong.
    """
    expected = {}
    for i, group in enumerate(spec.groups):
        expected[f"codes{i}"] = page_bytes(group.bits, group.channels)
        expected[f"scale{i}"] = PAGE_TOKENS
    if spec.estimator == "prod":
        expected |= {"sketch": page_bytes(1, spec.head_dim), "residual": PAGE_TOKENS}
    if spec.page_keys:
        expected |= dict.fromkeys(("mean0", "sink0"), spec.head_dim)
    if set(planes) != set(expected):
        raise InvalidInputError(f"planes {sorted(planes)} are not this codec's; it has {sorted(expected)}")
    lead = planes["codes0"].shape[:3]
    for name, size in expected.items():
        if tuple(planes[name].shape) != (*lead, size):
            shape = tuple(planes[name].shape)
            raise InvalidInputError(f"plane {name!r} must be {(*lead, size)}, got {shape}")
    return lead[0], lead[1], lead[2]


@kept
def level_table(book: Codebook, device: torch.device) -> Tensor:
    """The table in which `read_pages` looks levels up. Cached and shared: do not write to it."""
    return page_table(book.level_tensor(device), book.bits)


@kept
def sign_table(device: torch.device) -> Tensor:
    """The table for the signs of a sketch, as `level_table` for levels."""
    return page_table(torch.tensor([-1.0, 1.0], dtype=torch.float32, device=device), 1)
