"""Encoding in plain PyTorch, in float32: the truth that the kernels are held to.

Vectors are divided by their largest coordinate first, so that no norm overflows or vanishes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import isfinite
from operator import itemgetter

import torch
from torch import Tensor

from quantpress.deferred import deferred_checks, judge
from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.kernels.encode.nearest import nearest_level
from quantpress.kernels.layout import PAGE_TOKENS, pack_pages
from quantpress.quantization.numerics import exact_product
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.rotation import Rotation
from quantpress.quantization.spec import CodecSpec
from quantpress.quantization.transform import ChannelTransform

SINK_SCALE = -1.0
"""Stored in the place of the scale of a page's sink, whose key is not read from its codes."""

WORKSPACE_VALUES = 1 << 20  # coordinates encoded at a time; about 24 bytes of workspace each

EncodeChunk = Callable[[Tensor, ChannelTransform], dict[str, Tensor]]


def check_vectors(x: Tensor, spec: CodecSpec, transform: ChannelTransform) -> None:
    """Check the arguments of `encode_pages`.

    Raises:
        InvalidInputError: x is not floating [B, Hkv, T, D] of whole pages, or does not fit the transform.
    """
    if x.dim() != 4 or x.shape[-1] != spec.head_dim or x.shape[2] % PAGE_TOKENS or not x.is_floating_point():
        raise InvalidInputError(
            f"encode needs floating [B, Hkv, T, {spec.head_dim}] with T a multiple of {PAGE_TOKENS}, "
            f"got {x.dtype} {tuple(x.shape)}"
        )
    transform.check(x)


@torch.no_grad()
def encode_pages_reference(
    x: Tensor, spec: CodecSpec, transform: ChannelTransform, queries: QueryMoments | None = None
) -> dict[str, Tensor]:
    """Quantize vectors and pack their codes into pages. See `quantpress.kernels.encode.encode_pages`.

    Args:
        x: [B, Hkv, T, D].
        spec: the codec.
        transform: of each [B, Hkv].
        queries: with `page_keys`, moments of scaled queries, by which the sink of each page is chosen; None:
            the sink is the key furthest from the mean.
    """
    return in_chunks(x, transform, lambda part, local: _encode_chunk(part, spec, local, queries))


def in_chunks(
    x: Tensor, transform: ChannelTransform, encode: EncodeChunk, values: int = WORKSPACE_VALUES
) -> dict[str, Tensor]:
    """Encode pages a workspace at a time.

    Args:
        x: [B, Hkv, T, D], T a multiple of `PAGE_TOKENS`.
        transform: of each [B, Hkv].
        encode: makes planes [b, Hkv, p, ...] of pages [b, Hkv, p, 128, D] and the transform of these b.
        values: coordinates at a time; at least one page of all heads is.

    Returns:
        The planes [B, Hkv, P, ...] of all pages.
    """
    batch, heads, tokens, dim = x.shape
    pages = x.reshape(batch, heads, tokens // PAGE_TOKENS, PAGE_TOKENS, dim)
    planes: dict[str, Tensor] = {}
    for rows, columns in _chunks(batch, heads, pages.shape[2], dim, values):
        part = encode(pages[rows, :, columns], transform.entries(itemgetter(rows)))
        for name, plane in part.items():
            if name not in planes:
                planes[name] = plane.new_empty(*pages.shape[:3], plane.shape[-1])
            planes[name][rows, :, columns] = plane
    return planes


def _chunks(batch: int, heads: int, pages: int, dim: int, values: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the pages, chunks of which fit the workspace; an empty one for no pages."""
    budget = max(1, values // max(1, heads * PAGE_TOKENS * dim))  # (sequence, page) pairs at a time
    wide = min(max(1, pages), budget)
    tall = max(1, budget // wide) if wide == max(1, pages) else 1
    for row in range(0, max(1, batch), tall):
        for column in range(0, max(1, pages), wide):
            yield slice(row, row + tall), slice(column, column + wide)


def _encode_chunk(
    x: Tensor, spec: CodecSpec, transform: ChannelTransform, queries: QueryMoments | None
) -> dict[str, Tensor]:
    """[B, Hkv, P, 128, D] -> planes."""
    raw, x = x, transform.apply(x)
    dtype = spec.torch_scale_dtype
    planes: dict[str, Tensor] = {}
    sinks = None
    if spec.page_keys:
        keys, sinks, x = page_keys(raw, x, spec, transform, queries)
        planes |= keys
    start = 0
    for i, group in enumerate(spec.groups):
        part = x[..., start : start + group.channels]
        start += group.channels
        unit, norm = rotated_unit(part, spec.rotation_of(i))
        codes, levels = nearest_level(spec.codebook_of(i), x.device)(unit)
        ratio = scale_ratio(unit, levels, spec.scale_rule)
        scale = saturate(norm * ratio, dtype)
        planes[f"codes{i}"] = pack_pages(codes, group.bits, spec.role, checked=True)
        planes[f"scale{i}"] = scale if sinks is None else mark_sinks(scale, sinks)
        if spec.estimator == "prod":
            stored = (scale.float() / norm.masked_fill(norm == 0, 1.0)).unsqueeze(-1)
            residual = unit - stored * levels
            sketch = exact_product(residual, spec.sketch_matrix(x.device, torch.float32).T) >= 0
            planes["sketch"] = pack_pages(sketch.to(torch.uint8), 1, spec.role, checked=True)
            planes["residual"] = saturate(norm * torch.linalg.vector_norm(residual, dim=-1), dtype)
    return planes


def page_keys(
    raw: Tensor, x: Tensor, spec: CodecSpec, transform: ChannelTransform, queries: QueryMoments | None
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The keys that pages store beside their codes.

    Args:
        raw: keys [B, Hkv, P, 128, D].
        x: the same, transformed.
        spec: the codec.
        transform: of each [B, Hkv].
        queries: as for `encode_pages_reference`.

    Returns:
        The planes "mean0" and "sink0"; which token is the sink, [B, Hkv, P] int64; and x without the means.
    """
    dtype = spec.torch_scale_dtype
    mean = _saturate_both(x.mean(dim=-2), dtype)
    rest = x - mean.float().unsqueeze(-2)
    if queries is None:
        sinks = torch.linalg.vector_norm(rest, dim=-1).argmax(-1)
    else:
        sinks = queries.likeliest(replace(transform, weight=None, order=None).apply(raw))
    chosen = x.take_along_dim(sinks[..., None, None], -2).squeeze(-2)
    return {"mean0": mean, "sink0": _saturate_both(chosen, dtype)}, sinks, rest


def mark_sinks(scales: Tensor, sinks: Tensor) -> Tensor:
    """Scales [B, Hkv, P, 128] with that of the sinks [B, Hkv, P] as the mark of one."""
    return scales.scatter(-1, sinks.unsqueeze(-1), SINK_SCALE)


def _saturate_both(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def rotated_unit(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Unit vectors y / |y| [..., C] of y = rotate(x), and |y| [...]; zero for zero vectors."""
    largest = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True)
    if largest.numel():
        judge(_check_finite, largest.max())
    if deferred_checks() is not None:  # no NaN may reach a table of levels before the verdict
        broken = ~largest.isfinite()
        x, largest = x.masked_fill(broken, 0), largest.masked_fill(broken, 0)
    y = rotation.forward(x / largest.masked_fill(largest == 0, 1.0))
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    y /= norm.masked_fill(norm == 0, 1.0)
    return y, (norm * largest).squeeze(-1).clamp_(max=torch.finfo(torch.float32).max)


def _check_finite(largest: list[float]) -> None:
    if not all(map(isfinite, largest)):
        raise NonFiniteError("vectors to encode hold NaN or infinity, or overflow in the channel transform")


def scale_ratio(unit: Tensor, levels: Tensor, rule: str) -> Tensor:
    """The scale of unit vectors [..., C] whose codes have levels [..., C]: [...]."""
    if rule == "norm":
        return torch.ones_like(unit[..., 0])
    if rule == "norm_corrected":
        stretch: Tensor = torch.linalg.vector_norm(levels, dim=-1)
    else:
        stretch = (unit * levels).sum(dim=-1)  # 0 for a zero vector only: a level has its coordinate's sign
    return stretch.masked_fill(stretch == 0, 1.0).reciprocal()


def saturate(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in their dtype; one beyond it becomes the largest that it holds."""
    return scale.clamp(max=torch.finfo(dtype).max).to(dtype)
