"""Inner products with packed vectors in plain PyTorch, a chunk of pages at a time."""

import torch
from torch import Tensor

from quantpress.kernels.dequantize.reference import WORKSPACE_VALUES, level_table, sign_table
from quantpress.kernels.layout import PAGE_TOKENS, read_pages
from quantpress.quantization.numerics import exact_product
from quantpress.quantization.qjl import SQRT_HALF_PI
from quantpress.quantization.spec import CodecSpec


def inner_products_reference(query: Tensor, planes: dict[str, Tensor], spec: CodecSpec) -> Tensor:
    """See `quantpress.kernels.score.inner_products`."""
    batch, heads, queries, dim = query.shape
    pages = planes["codes0"].shape[2]
    device = query.device
    out = torch.zeros(batch, heads, queries, pages * PAGE_TOKENS, dtype=torch.float32, device=device)
    start = 0
    for i, group in enumerate(spec.groups):
        part = query[..., start : start + group.channels]
        table = level_table(spec.codebook_of(i), device)
        _add(out, part, planes[f"codes{i}"], planes[f"scale{i}"], table, group.bits, spec.role)
        start += group.channels
    if spec.estimator == "prod":
        sketched = exact_product(query, spec.sketch_matrix(device, torch.float32).T) * (SQRT_HALF_PI / dim)
        _add(out, sketched, planes["sketch"], planes["residual"], sign_table(device), 1, spec.role)
    return out


def _add(
    out: Tensor, query: Tensor, packed: Tensor, scale: Tensor, table: Tensor, bits: int, role: str
) -> None:
    """Add scale * (query . level): out [B, Hkv, Q, T], query [B, Hkv, Q, C], planes [B, Hkv, P, ...]."""
    rows, channels = query.shape[0] * query.shape[1], query.shape[-1]
    wide = max(1, WORKSPACE_VALUES // max(1, rows * PAGE_TOKENS * channels))
    for page in range(0, packed.shape[2], wide):
        at = slice(page, page + wide)
        levels = read_pages(packed[:, :, at].flatten(0, 1), table, bits, channels, role)
        levels = levels.reshape(*query.shape[:2], -1, channels)  # [B, Hkv, tokens of the chunk, C]
        factor = scale[:, :, at].flatten(2, 3).float().unsqueeze(2)
        tokens = slice(page * PAGE_TOKENS, page * PAGE_TOKENS + levels.shape[2])
        out[..., tokens] += query @ levels.mT * factor
