"""Linear layers over few rows, in one launch (Triton). Time goes into reading the weights.

A program multiplies CHANNELS rows of a weight matrix by every row of x, BLOCK columns at a time. It loads the
next columns before it multiplies, and the first ones before the kernel before it has ended: weights do not
depend on that one, x does. Sums are in float32; the tree at the end adds up what the threads have.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quantpress.kernels.joined.product_kernel import gated

_EACH = tl.constexpr(8)  # numbers of 16 bits that a thread loads at once


@triton.jit
def _columns(step, BLOCK: tl.constexpr):
    """[1, 1, BLOCK / 8, 8]: the columns of block `step`."""
    of_thread, of_load = tl.arange(0, BLOCK // _EACH), tl.arange(0, _EACH)
    return (step * BLOCK + of_thread[:, None] * _EACH + of_load[None, :])[None, None, :, :]


@triton.jit
def _weights(weight_ptr, channel, step, K: tl.constexpr, BLOCK: tl.constexpr):
    """[CHANNELS, 1, BLOCK / 8, 8]: block `step` of the rows `channel`, which nothing reads again."""
    column = _columns(step, BLOCK)
    at = channel.to(tl.int64)[:, None, None, None] * K + column
    if K % BLOCK:
        return tl.load(weight_ptr + at, mask=column < K, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(weight_ptr + at, eviction_policy="evict_first")


@triton.jit
def _inputs(x_ptr, row, step, K: tl.constexpr, BLOCK: tl.constexpr):
    """[1, ROWS, BLOCK / 8, 8] float32: block `step` of the rows of x."""
    column = _columns(step, BLOCK)
    return tl.load(x_ptr + row[None, :, None, None] * K + column, mask=column < K, other=0.0).to(tl.float32)


@triton.jit
def _store(y_ptr, y, channel, row, n, ROWS: tl.constexpr, R: tl.constexpr):
    """Write [CHANNELS, ROWS] to where rows of n numbers lie; R: how many there are."""
    inside = (channel[:, None] < n) & (row[None, :] < R)
    tl.store(y_ptr + row[None, :] * n + channel[:, None], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n", "second_n", "third_n"])
def linear_kernel(
    x_ptr,
    weight_ptr,
    second_ptr,
    third_ptr,
    bias_ptr,
    second_bias_ptr,
    third_bias_ptr,
    residual_ptr,
    y_ptr,
    n,
    second_n,
    third_n,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """CHANNELS outputs (axis 0) of up to three linear layers with the same input.

    x: [R, K]; weight, second, third: [n, K], [second_n, K], [third_n, K]; bias and so on: [n], or all
    None, as are those that PARTS leaves out; residual: [R, n], added to the rounded result, or None; y:
    [R, n], then [R, second_n], then [R, third_n]. All contiguous, addresses multiples of 16 bytes. PARTS:
    how many layers; K: a multiple of 8; ROWS, CHANNELS, BLOCK: powers of two, ROWS at least R; CHAINED:
    see the module. Axis 0 has the programs of the first layer, then those of the second and third. Launch
    it with `FUSED`.
    """
    if CHAINED:
        gdc_launch_dependents()
    block, before = tl.program_id(0), 0
    own_ptr, own_bias_ptr = weight_ptr, bias_ptr
    if PARTS > 1:
        blocks, more = tl.cdiv(n, CHANNELS), tl.cdiv(second_n, CHANNELS)
        if PARTS == 2:  # a branch that a program takes may not name a third: it is None
            if block >= blocks:
                block, before = block - blocks, n
                own_ptr, own_bias_ptr, n = second_ptr, second_bias_ptr, second_n
        elif block >= blocks + more:
            block, before = block - blocks - more, n + second_n
            own_ptr, own_bias_ptr, n = third_ptr, third_bias_ptr, third_n
        elif block >= blocks:
            block, before = block - blocks, n
            own_ptr, own_bias_ptr, n = second_ptr, second_bias_ptr, second_n
        own_ptr = tl.multiple_of(own_ptr, 16)
    channel, row = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    here, x_row = tl.minimum(channel, n - 1), tl.minimum(row, R - 1)
    STEPS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    weight = _weights(own_ptr, here, 0, K, BLOCK)
    if CHAINED:
        gdc_wait()
    sums = tl.zeros([CHANNELS, ROWS, BLOCK // _EACH], tl.float32)
    for step in range(STEPS - 1):
        x = _inputs(x_ptr, x_row, step, K, BLOCK)
        following = _weights(own_ptr, here, step + 1, K, BLOCK)
        sums += tl.sum(weight.to(tl.float32) * x, 3)
        weight = following
    sums += tl.sum(weight.to(tl.float32) * _inputs(x_ptr, x_row, STEPS - 1, K, BLOCK), 3)
    y = tl.sum(sums, 2)
    if own_bias_ptr is not None:
        y += tl.load(own_bias_ptr + here).to(tl.float32)[:, None]
    if residual_ptr is not None:
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        y = y.to(dtype).to(tl.float32) + tl.load(residual_ptr + x_row[None, :] * n + here[:, None]).to(
            tl.float32
        )
    _store(y_ptr + before * R, y, channel, row, n, ROWS, R)


@triton.jit(do_not_specialize=["n"])
def gated_linear_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    y_ptr,
    n,
    K: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
    LIBRARY: tl.constexpr,
):
    """CHANNELS outputs (axis 0) of two linear layers, and SiLU of the one times the other.

    x: [R, K]; gate, up: [n, K]; gate_bias, up_bias: [n], or None; y: [R, n]; the rest as for `linear_kernel`;
    LIBRARY: as for `gated`. Both layers' outputs are rounded to the dtype of y first.
    """
    if CHAINED:
        gdc_launch_dependents()
    channel, row = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, ROWS)
    here, x_row = tl.minimum(channel, n - 1), tl.minimum(row, R - 1)
    STEPS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    gate_weight, up_weight = _weights(gate_ptr, here, 0, K, BLOCK), _weights(up_ptr, here, 0, K, BLOCK)
    if CHAINED:
        gdc_wait()
    gate = tl.zeros([CHANNELS, ROWS, BLOCK // _EACH], tl.float32)
    up = tl.zeros([CHANNELS, ROWS, BLOCK // _EACH], tl.float32)
    for step in range(STEPS - 1):
        x = _inputs(x_ptr, x_row, step, K, BLOCK)
        gate_following = _weights(gate_ptr, here, step + 1, K, BLOCK)
        up_following = _weights(up_ptr, here, step + 1, K, BLOCK)
        gate += tl.sum(gate_weight.to(tl.float32) * x, 3)
        up += tl.sum(up_weight.to(tl.float32) * x, 3)
        gate_weight, up_weight = gate_following, up_following
    x = _inputs(x_ptr, x_row, STEPS - 1, K, BLOCK)
    gate += tl.sum(gate_weight.to(tl.float32) * x, 3)
    up += tl.sum(up_weight.to(tl.float32) * x, 3)
    gate_sum, up_sum = tl.sum(gate, 2), tl.sum(up, 2)
    if gate_bias_ptr is not None:
        gate_sum += tl.load(gate_bias_ptr + here).to(tl.float32)[:, None]
    if up_bias_ptr is not None:
        up_sum += tl.load(up_bias_ptr + here).to(tl.float32)[:, None]
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    y = gated(gate_sum.to(dtype), up_sum.to(dtype), LIBRARY)
    _store(y_ptr, y, channel, row, n, ROWS, R)
