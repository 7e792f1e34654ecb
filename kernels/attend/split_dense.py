"""One query token over tokens that are all kept in 16 bits (Triton): splits of them, then these joined."""

import triton
import triton.language as tl

from quantpress.kernels.attend.dense import attend_tile, load_queries, load_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["rows", "blocks", "tokens"])
def dense_split_kernel(
    query_ptr,
    k_ptr,
    v_ptr,
    used_ptr,
    starts_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    scale,
    softcap,
    rows,
    blocks,
    tokens,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    USED: tl.constexpr,
    STARTS: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Softmax sums of each split (axis 0) of a (batch, KV head, block of R rows) (axis 1), N in all.

    query [BH, rows, D]; keys [BH, tokens, D] and values [BH, tokens, DV] contiguous; o [N, SPLITS, R, DV], m
    and l [N, SPLITS, R] float32; used and starts [BH] int32, the number of tokens in use and the first of
    them, where their constant says so: no others are loaded, and the splits share these.
    """
    split, block = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, skipped = block // blocks, block % blocks * R
    begin, end = 0, tokens
    if STARTS:
        begin = tl.load(starts_ptr + head)
    if USED:
        end = tl.minimum(end, begin + tl.load(used_ptr + head))
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), TILE), SPLITS) * TILE
    low = begin + split * share
    high = tl.minimum(low + share, end)
    row, value = tl.arange(0, R), tl.arange(0, DV)
    q = load_queries(query_ptr, head, skipped, rows, D, R, PLAIN)
    k_ptr += head * tokens * D
    v_ptr += head * tokens * DV
    m = tl.full([R], -1e30, tl.float32)
    total = tl.zeros([R], tl.float32)
    out = tl.zeros([DV, R], tl.float32)
    for start in range(low, high, TILE):
        k, v = load_tile(k_ptr, v_ptr, start, low, high, D, DV, TILE, PLAIN)
        tile_m, tile_total, tile_out = attend_tile(
            q, 0 * row, k, v, start, low, high, 0, scale, softcap, DV, R, TILE, False
        )
        highest = tl.maximum(m, tile_m)
        old, new = tl.exp2(m - highest), tl.exp2(tile_m - highest)
        total = total * old + tile_total * new
        out = out * old[None, :] + tile_out * new[None, :]
        m = highest
    slot = (block * SPLITS + split) * R + row
    tl.store(o_ptr + slot[None, :] * DV + value[:, None], out)
    tl.store(m_ptr + slot, m)
    tl.store(l_ptr + slot, total)


@triton.jit(do_not_specialize=["rows", "group", "kv_heads", "blocks"])
def dense_merge_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    sinks_ptr,
    out_ptr,
    rows,
    group,
    kv_heads,
    blocks,
    DV: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Join the splits of a row (axis 0) of a (batch, KV head) (axis 1): out [BH, rows, DV]; sinks [Hq]."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    split, value = tl.arange(0, SPLITS), tl.arange(0, DV)
    slot = ((head * blocks + row // R) * SPLITS + split) * R + row % R
    m, total = tl.load(m_ptr + slot), tl.load(l_ptr + slot)
    highest = tl.max(m, 0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head % kv_heads * group + row).to(tl.float32) * LOG2_E
        highest = tl.maximum(highest, sink)
    weight = tl.exp2(m - highest)
    whole = tl.sum(total * weight, 0)
    if HAS_SINKS:
        whole += tl.exp2(sink - highest)
    parts = tl.load(o_ptr + slot[:, None] * DV + value[None, :])
    out = tl.sum(parts * weight[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out_ptr + (head * rows + row) * DV + value, out.to(out_ptr.dtype.element_ty))
