"""Combining two attentions in plain PyTorch: the truth that the kernel is held to."""

import torch

ROWS = 1024  # query tokens weighed at a time, in float32


def combine_reference(
    output: torch.Tensor, log_sum: torch.Tensor, other: torch.Tensor, other_log_sum: torch.Tensor
) -> None:
    """As `quantpress.kernels.combine.combine_attention`, on any device."""
    weight = torch.sigmoid(other_log_sum - log_sum)
    exact = torch.promote_types(output.dtype, torch.float32)
    for start in range(0, output.shape[2], ROWS):
        rows = (slice(None), slice(None), slice(start, start + ROWS))
        output[rows] = torch.lerp(output[rows].to(exact), other[rows].to(exact), weight[rows].to(exact))
    torch.logaddexp(log_sum, other_log_sum, out=log_sum)
