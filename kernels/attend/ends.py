"""What goes around the split kernel: preparing queries, and joining the splits (Triton)."""

import triton
import triton.language as tl

from quantpress.kernels.attend.split_k import RESIDUAL

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def prepare_kernel(
    query_ptr,
    weight_ptr,
    mean_ptr,
    rotation_ptr,
    q_ptr,
    factor_ptr,
    bias_ptr,
    scale,
    unit,
    rows,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Queries to code space, split into e4m3 parts. Program (row, head): one row of one (batch, KV head).

    query [BH, rows, D]; weight and mean [BH, D]; rotation [D, D]; q [BH, 2R, D] e4m3 (PLAIN: float32) with
    row r in the high half and its residual in the low one; factor [BH, R] undoes their scaling and the
    levels' unit, bias [BH, R] is q . mean.
    """
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, D)
    live = row < rows
    x = tl.load(query_ptr + (head * rows + row) * D + channel, mask=live, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_MEAN:
        bias = tl.sum(x * tl.load(mean_ptr + head * D + channel), 0) * scale
    if HAS_WEIGHT:
        x = x / tl.load(weight_ptr + head * D + channel)
    turn = tl.load(rotation_ptr + channel[:, None] * D + channel[None, :])
    y = tl.sum(turn * x[None, :], 1)
    largest = tl.maximum(tl.max(tl.abs(y), 0), 1e-30)
    y = y * (256.0 / largest)  # e4m3 goes to 448
    if PLAIN:
        high = y
        low = 0.0 * y
    else:
        near = y.to(tl.float8e4nv)
        low = ((y - near.to(tl.float32)) * RESIDUAL).to(tl.float8e4nv)
        high = near
    tl.store(q_ptr + (head * 2 * R + row) * D + channel, high)
    tl.store(q_ptr + (head * 2 * R + R + row) * D + channel, low)
    tl.store(factor_ptr + head * R + row, largest / 256.0 * scale * unit)
    tl.store(bias_ptr + head * R + row, bias)


@triton.jit
def merge_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    sinks_ptr,
    rotation_ptr,
    out_ptr,
    splits,
    rows,
    queries,
    group,
    kv_heads,
    unit,
    DV: tl.constexpr,
    R: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join the splits of one row of one (batch, KV head), rotate back once, join the 16-bit tokens.

    o [BH, S, R, DV], m and l [BH, S, R]; dense_* the same without S; sinks [Hkv * G] logits; out [BH, rows,
    DV].
    """
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    value, block = tl.arange(0, DV), tl.arange(0, BLOCK)
    m = tl.full([1], -1e30, tl.float32)
    total = tl.zeros([1], tl.float32)
    y = tl.zeros([DV], tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + block
        live = split < splits
        slot = (head * (splits + HAS_DENSE) + split) * R + row
        part_m = tl.load(m_ptr + slot, mask=live, other=-1e30)
        part_l = tl.load(l_ptr + slot, mask=live, other=0.0)
        part_o = tl.load(o_ptr + slot[:, None] * DV + value[None, :], mask=live[:, None], other=0.0)
        new = tl.maximum(m, tl.max(part_m, 0))
        decay = tl.exp2(m - new)
        weight = tl.exp2(part_m - new)
        y = y * decay + tl.sum(part_o * weight[:, None], 0)
        total = total * decay + tl.sum(part_l * weight, 0)
        m = new
    turn = tl.load(rotation_ptr + value[:, None] * DV + value[None, :])
    turned = tl.sum(turn * (y * unit)[:, None], 0)
    if HAS_DENSE:
        last = (head * (splits + 1) + splits) * R + row
        own_m = tl.load(m_ptr + last)
        new = tl.maximum(m, own_m)
        decay = tl.exp2(m - new)
        own = tl.exp2(own_m - new)
        turned = turned * decay + tl.load(o_ptr + last * DV + value) * own
        total = total * decay + tl.load(l_ptr + last) * own
        m = new
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head % kv_heads * group + row // queries).to(tl.float32) * LOG2_E
        new = tl.maximum(m, sink)
        decay = tl.exp2(m - new)
        turned = turned * decay
        total = total * decay + tl.exp2(sink - new)
    total = tl.where(total == 0, 1.0, total)  # nothing in use
    tl.store(out_ptr + (head * rows + row) * DV + value, turned / total)
