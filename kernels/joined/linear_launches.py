"""Launches the kernels of linear layers over few rows. Callers check shapes, dtypes and addresses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.kernels.available import FUSED
from quantpress.kernels.joined.launches import chained, device_of, power_above

MOST_ROWS = 2
"""Rows of x. With 4 on an H200 PyTorch is faster, by tensor cores; 3 were not timed."""

LONG = 8192
"""Columns of a weight matrix above which a program takes more rows of it."""

Weights = tuple[Tensor, Tensor | None]
"""Weight [N, K] and bias [N] of a linear layer, contiguous."""


@dataclass(frozen=True)
class Tiling:
    """What a program of a kernel takes at once.

    Args:
        channels: rows of the weight matrix, a power of two.
        block: columns, a power of two.
        warps: of a program.
    """

    channels: int
    block: int
    warps: int


def tiling_of(columns: int, rows: int, gated: bool) -> Tiling:
    """The fastest of those timed on an H200; a thread loads 64 or 128 bytes at a time.

    Args:
        columns: K of the weights.
        rows: of x.
        gated: for two weights at once.
    """
    if gated:
        channels, block, warps = (1, 4096, 4) if rows == 1 else (2, 1024, 4)
    elif rows == 1:
        channels, block, warps = (2, 2048, 4) if columns <= LONG else (4, 1024, 4)
    else:
        channels, block, warps = 2, 1024, 2
    return Tiling(channels, min(block, power_above(columns)), warps)


def linear(
    x: Tensor,
    layers: Sequence[Weights],
    residual: Tensor | None = None,
    out: Tensor | None = None,
    tiling: Tiling | None = None,
) -> list[Tensor]:
    """Up to three linear layers with the same input, summed in float32 and rounded once.

    Args:
        x: [..., K] of `MOST_ROWS` rows at most, float16 or bfloat16, K a multiple of 8.
        layers: the weights, in the dtype of x; all of them have a bias, or none.
        residual: [..., N], contiguous, added to what one layer gives, which is rounded first.
        out: [..., N], contiguous, written with what one layer gives; None: new memory.
        tiling: None: `tiling_of`.

    Returns:
        [..., N] for each layer, contiguous.
    """
    from quantpress.kernels.joined.linear_kernel import linear_kernel

    columns = x.shape[-1]
    rows, sizes = x.numel() // columns, [weight.shape[0] for weight, _ in layers]
    tiling = tiling or tiling_of(columns, rows, gated=False)
    y = torch.empty(rows * sum(sizes), dtype=x.dtype, device=x.device) if out is None else out.view(-1)
    none = [None] * (3 - len(layers))
    with device_of(x):
        linear_kernel[(sum(-(-size // tiling.channels) for size in sizes),)](
            x,
            *(weight for weight, _ in layers),
            *none,
            *(bias for _, bias in layers),
            *none,
            residual,
            y,
            *sizes,
            *(0 for _ in none),
            PARTS=len(layers),
            K=columns,
            R=rows,
            ROWS=power_above(rows),
            CHANNELS=tiling.channels,
            BLOCK=tiling.block,
            num_warps=tiling.warps,
            **chained(x.device),
            **FUSED,
        )
    outputs = y.split([rows * size for size in sizes])
    return [one.view(*x.shape[:-1], size) for one, size in zip(outputs, sizes, strict=True)]


def gated_linear(x: Tensor, layers: Sequence[Weights], tiling: Tiling | None = None) -> Tensor:
    """SiLU of one linear layer times another one, each rounded as PyTorch rounds it.

    Args:
        x: as for `linear`.
        layers: the layer that SiLU is taken of and the other one, of one shape, in the dtype of x.
        tiling: None: `tiling_of`.

    Returns:
        [..., N], contiguous.
    """
    from quantpress.kernels.joined.linear_kernel import gated_linear_kernel

    (gate, gate_bias), (up, up_bias) = layers
    columns, size = x.shape[-1], gate.shape[0]
    rows = x.numel() // columns
    tiling = tiling or tiling_of(columns, rows, gated=True)
    y = torch.empty(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    with device_of(x):
        gated_linear_kernel[(-(-size // tiling.channels),)](
            x,
            gate,
            up,
            gate_bias,
            up_bias,
            y,
            size,
            K=columns,
            R=rows,
            ROWS=power_above(rows),
            CHANNELS=tiling.channels,
            BLOCK=tiling.block,
            LIBRARY=x.is_cuda,
            num_warps=tiling.warps,
            **chained(x.device),
            **FUSED,
        )
    return y
