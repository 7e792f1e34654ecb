"""Queries into the code space of parts (Triton)."""

import triton
import triton.language as tl

from quantpress.kernels.padding import padded


@triton.jit(do_not_specialize=["rows", "kv_heads", "channels"])
def turn_queries_kernel(
    query_ptr,
    weight_ptr,
    mean_ptr,
    order_ptr,
    turn_ptr,
    slots_ptr,
    y_ptr,
    bias_ptr,
    scale,
    rows,
    kv_heads,
    channels,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    ORDERED: tl.constexpr,
    SHARED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """SIZE channels in code space (axis 2) of one row (axis 0) of one (batch, KV head) (axis 1).

    query: [BH, rows, D]; weight, mean float32 and order int16 [BH, D], if HAS_WEIGHT, HAS_MEAN and ORDERED;
    SHARED: they are [Hkv, D], for every batch entry; SLOTS: they are [slots * Hkv, D], and slots [B] int64
    names the slot of each batch entry; turn: [E, D] float32; scale: factor on q.k in units of log 2.
    Written: y [BH, rows, E] float32, E = channels, scale * turn (q / weight)[order]; and bias [BH, rows],
    scale * q.mean.
    """
    row, head, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    own = head
    if SLOTS:
        own = tl.load(slots_ptr + head // kv_heads) * kv_heads + head % kv_heads
    if SHARED:
        own = head % kv_heads
    channel = tl.arange(0, padded(D))
    live = channel < D
    at = part * SIZE + tl.arange(0, SIZE)
    turn = tl.load(turn_ptr + at[:, None] * D + channel[None, :], mask=live[None, :], other=0.0)
    source = channel
    if ORDERED:
        source = tl.load(order_ptr + own * D + channel, mask=live, other=0).to(tl.int32)
    from_row = query_ptr + (head * rows + row) * D
    x = tl.load(from_row + source, mask=live, other=0.0).to(tl.float32) * scale
    if HAS_WEIGHT:
        x = x / tl.load(weight_ptr + own * D + source, mask=live, other=1.0)
    to_row = head * rows + row
    tl.store(y_ptr + to_row * channels + at, tl.sum(turn * x[None, :], 1))
    if part == 0:
        bias = 0.0
        if HAS_MEAN:
            unmoved = tl.load(from_row + channel, mask=live, other=0.0).to(tl.float32) * scale
            bias = tl.sum(unmoved * tl.load(mean_ptr + own * D + channel, mask=live, other=0.0), 0)
        tl.store(bias_ptr + to_row, bias)
