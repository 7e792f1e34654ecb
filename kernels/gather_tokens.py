"""Pages of selected tokens of other pages: codes and scales are copied, nothing is decoded or quantized."""

import torch

from quantpress.kernels.layout import PAGE_TOKENS, pack_pages, unpack_pages
from quantpress.quantization.spec import CodecSpec


def gather_tokens(
    planes: dict[str, torch.Tensor], spec: CodecSpec, tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Make pages of selected tokens of other pages, with their codes and scales unchanged.

    Args:
        planes: what `encode_pages` returned, [B, Hkv, P, ...].
        spec: the codec that made them.
        tokens: [B, Hkv, N] int64, each in 0 to 128 * P - 1, N a multiple of `PAGE_TOKENS`.

    Returns:
        Planes [B, Hkv, N / 128, ...].
    """
    widths = {f"codes{i}": (group.bits, group.channels) for i, group in enumerate(spec.groups)}
    if spec.estimator == "prod":
        widths["sketch"] = (1, spec.head_dim)
    gathered = {}
    for name, plane in planes.items():
        if name in widths:
            bits, channels = widths[name]
            codes = gather_rows(unpack_pages(plane, bits, channels, spec.role), tokens)
            gathered[name] = pack_pages(codes, bits, spec.role)
        else:  # one number a token
            gathered[name] = gather_rows(plane.unsqueeze(-1), tokens).squeeze(-1)
    return gathered


def gather_rows(pages: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of pages [B, Hkv, P, 128, C] at tokens [B, Hkv, N] -> [B, Hkv, N / 128, 128, C]."""
    index = tokens.unsqueeze(-1).expand(-1, -1, -1, pages.shape[-1])
    rows = pages.flatten(2, 3).gather(2, index)
    return rows.view(*rows.shape[:2], -1, PAGE_TOKENS, rows.shape[-1])
