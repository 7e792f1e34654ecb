"""SiLU of the gate times the other projection, in one launch (Triton)."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _exp(x, LIBRARY: tl.constexpr):
    """CUDA's expf, as in PyTorch; Triton's interpreter has no libdevice."""
    if LIBRARY:
        return libdevice.exp(x)
    else:
        return tl.exp(x)


@triton.jit
def gated(gate, up, LIBRARY: tl.constexpr):
    """silu(gate) * up, SiLU and the product rounded to the dtype of both; LIBRARY: where not interpreted."""
    wide = gate.to(tl.float32)
    active = tl.div_rn(wide, 1.0 + _exp(-wide, LIBRARY)).to(gate.dtype).to(tl.float32)
    return (active * up.to(tl.float32)).to(gate.dtype)


@triton.jit(do_not_specialize=["channels", "gate_row", "up_row"])
def silu_product_kernel(
    gate_ptr,
    up_ptr,
    output_ptr,
    channels,
    gate_row,
    up_row,
    BLOCK: tl.constexpr,
    LIBRARY: tl.constexpr,
):
    """silu(gate) * up for BLOCK channels (axis 0) of one row (axis 1), SiLU rounded to the dtype of gate.

    gate, up: [rows, channels], channels contiguous; output: likewise, contiguous; *_row: strides. Launch it
    with `ROUNDED`.
    """
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    gate = tl.load(gate_ptr + row * gate_row + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_row + at, mask=inside, other=0.0)
    tl.store(output_ptr + row * channels + at, gated(gate, up, LIBRARY), mask=inside)
