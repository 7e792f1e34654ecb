"""Combines attention to two sets of keys into attention to both, weighted by their sums of exponentials."""

import contextlib

import torch

from quantpress.kernels.available import FUSED, runs_triton
from quantpress.kernels.combine.reference import combine_reference
from quantpress.quantization.numerics import in_named_dtypes


@in_named_dtypes
def combine_attention(
    output: torch.Tensor, log_sum: torch.Tensor, other: torch.Tensor, other_log_sum: torch.Tensor
) -> None:
    """Combine attention to other keys into `output` and `log_sum`, in place, in float32.

        output = s * other + (1 - s) * output,   s = sigmoid(other_log_sum - log_sum)

    Args:
        output: [B, H, T, D], attention to some keys.
        log_sum: [B, H, T, 1] float32 or float64, the natural logarithm of its sum of exponentials.
        other: like `output`, to other keys.
        other_log_sum: like `log_sum`.
    """
    if runs_triton(output.device) and _has_kernel(output, other):
        launch_combine(output, log_sum, other, other_log_sum)
    else:
        combine_reference(output, log_sum, other, other_log_sum)


def _has_kernel(*outputs: torch.Tensor) -> bool:
    return all(one.stride(3) == 1 and one.dtype in (torch.bfloat16, torch.float16) for one in outputs)


def launch_combine(
    output: torch.Tensor, log_sum: torch.Tensor, other: torch.Tensor, other_log_sum: torch.Tensor
) -> None:
    """As `combine_attention`, by the Triton kernel, for 16-bit outputs with contiguous channels."""
    from quantpress.kernels.combine.triton_kernel import TOKENS, combine_kernel

    batch, heads, tokens, channels = output.shape
    padded = 1 << (channels - 1).bit_length()
    strides = [one.stride(dim) for one in (output, log_sum, other, other_log_sum) for dim in range(3)]
    with torch.cuda.device(output.device) if output.is_cuda else contextlib.nullcontext():
        combine_kernel[(-(-tokens // TOKENS.value), batch * heads)](
            output, log_sum, other, other_log_sum, heads, tokens, channels, *strides, CHANNELS=padded, **FUSED
        )
