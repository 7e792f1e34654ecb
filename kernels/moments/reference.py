"""Moments of queries, and checks of states, in plain PyTorch: the truth that the kernels are held to."""

import torch
from torch import Tensor


def query_moment_reference(
    queries: Tensor, kv_heads: int, computed: Tensor | None, actual: Tensor | None, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    """As `quantpress.kernels.moments.query_moment`."""
    batch, _, tokens, dim = queries.shape
    grouped = queries.float().reshape(batch, kv_heads, -1, tokens, dim)  # [B, Hkv, G, W, D]
    moment = grouped.square().mean(dim=(2, 3))
    if computed is None or actual is None:
        return moment, None
    agree = agree_reference(computed, actual, tolerance)
    return moment.where(agree, 0.0), agree


def agree_reference(computed: Tensor, actual: Tensor, tolerance: float) -> Tensor:
    """Whether keys are right, [] bool; see `quantpress.kernels.moments.query_moment`."""
    kept = actual != 0
    error = ((computed - actual).float() * kept).norm()
    agree: Tensor = (error <= tolerance * actual.float().norm()) & kept.any()
    return agree


def not_finite_reference(*states: Tensor) -> Tensor:
    """As `quantpress.kernels.moments.not_finite`, [n] bool."""
    ends = [torch.stack(torch.aminmax(one)) if one.numel() else one.new_zeros(2) for one in states]
    return torch.stack([~pair.isfinite().all() for pair in ends])
