"""Launches the kernels of this folder. Callers check shapes and dtypes, and that all is on one device."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from quantpress.kernels.available import ROUNDED, chains
from quantpress.kernels.joined.order import AddingOrder
from quantpress.kernels.joined.reference import ROUNDED_THEN_WEIGHED
from quantpress.kernels.quick import quick

BLOCK = 512
"""Channels of one program of `silu_product`."""

TOKENS = 16
"""Tokens of one program of `rotary`, at most."""


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Where a launch goes; nothing where the interpreter runs."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def power_above(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def chained(device: torch.device) -> dict[str, bool]:
    """Arguments of a kernel that may start before the last one has ended, where the device can do that."""
    return {"CHAINED": True, "launch_pdl": True} if chains(device) else {"CHAINED": False}


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int, order: AddingOrder) -> Tensor:
    """As `rms_norm_reference`, adding in the order given.

    Args:
        x: [..., N], contiguous, N a multiple of 4.
        weight: [N], contiguous.
        eps: as there.
        form: as there.
        order: one of `adding_orders`.
    """
    from quantpress.kernels.joined.norm_kernel import rms_norm_kernel

    size, threads = x.shape[-1], order.width * order.height
    mixed = torch.promote_types(x.dtype, weight.dtype) if form == ROUNDED_THEN_WEIGHED else x.dtype
    output = torch.empty_like(x, dtype=mixed)
    with device_of(x):
        quick(rms_norm_kernel)[(x.numel() // size,)](
            x,
            weight,
            output,
            1.0 / size,
            eps,
            SIZE=size,
            TURNS=power_above(-(-size // (4 * threads))),
            WIDTH=order.width,
            HEIGHT=order.height,
            VECTORIZED=order.vectorized,
            NEIGHBOURS_FIRST=order.neighbours_first,
            FORM=form,
            num_warps=max(1, min(4, threads // 32)),
            **chained(x.device),
            **ROUNDED,
        )
    return output


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotary_reference`.

    Args:
        q: [B, Hq, T, D], channels contiguous, D even.
        k: [B, Hkv, T, D], likewise.
        cos: [B or 1, T, D], likewise.
        sin: like cos.

    Returns:
        The queries and the keys, in memory as q and k are; contiguous for one token.
    """
    from quantpress.kernels.joined.rotary_kernel import rotary_kernel

    tokens = q.shape[2]
    turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    if tokens > 1:
        turned = [torch.empty_like(x) for x in (q, k)]
    block, half = min(TOKENS, power_above(tokens)), q.shape[-1] // 2
    strides = [x.stride(dim) for x in (q, k, *turned) for dim in range(3)]
    for x in (cos, sin):
        strides += [0 if x.shape[0] == 1 else x.stride(0), x.stride(1)]
    with device_of(q):
        quick(rotary_kernel)[(q.shape[1] + k.shape[1], -(-tokens // block), q.shape[0])](
            q,
            k,
            cos,
            sin,
            *turned,
            q.shape[1],
            tokens,
            *strides,
            HALF=half,
            CHANNELS=power_above(half),
            TOKENS=block,
            num_warps=1 if block == 1 else 4,
            **chained(q.device),
            **ROUNDED,
        )
    return turned[0], turned[1]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """As `silu_product_reference`.

    Args:
        gate: [..., C], channels contiguous, such as the first half of the channels of a projection.
        up: like gate, of the same shape and dtype.

    Returns:
        [..., C], contiguous.
    """
    from quantpress.kernels.joined.product_kernel import silu_product_kernel

    output, channels = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device), gate.shape[-1]
    rows = [one.view(-1, channels) for one in (gate, up)]
    with device_of(gate):
        quick(silu_product_kernel)[(-(-channels // BLOCK), rows[0].shape[0])](
            *rows,
            output,
            channels,
            rows[0].stride(0),
            rows[1].stride(0),
            BLOCK=BLOCK,
            LIBRARY=gate.is_cuda,
            **ROUNDED,
        )
    return output


def launch_write(keys: Tensor, values: Tensor, newest: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
    """As `quantpress.kernels.joined.write_token`, for new tokens with contiguous channels."""
    from quantpress.kernels.joined.write_kernel import write_token_kernel

    batch, heads, capacity, channels = keys.shape
    strides = [one.stride(dim) for one in (new_keys, new_values) for dim in range(2)]
    with device_of(keys):
        write_token_kernel[(heads, batch)](
            keys,
            values,
            newest,
            new_keys,
            new_values,
            heads,
            capacity,
            *strides,
            D=channels,
            DV=values.shape[-1],
            CHANNELS=power_above(max(channels, values.shape[-1])),
            num_warps=1,
            **chained(keys.device),
            **ROUNDED,
        )
