"""Decode attention over keys and values in FP8 (e4m3): the baseline that needs no package, in two launches.

A cache has one scale for all keys and one for all values, as vLLM stores it. A program reads the tokens of
one split of a KV head, a few tiles ahead, and sums them for the query heads of its group. A second launch
merges the splits. Two neighbouring channels are read as one word of 16 bits, because shared memory hands
values to the tensor cores transposed in words of that size only; bytes would be read one by one. One
instruction turns two bytes into float16, exactly.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DECODE = tl.constexpr("""{ .reg .b32 sorted; .reg .b16 even, odd;
prmt.b32 sorted, $2, 0, 0x3120;
mov.b32 {even, odd}, sorted;
cvt.rn.f16x2.e4m3x2 $0, even;
cvt.rn.f16x2.e4m3x2 $1, odd;
}""")
"""Two words of 16 bits: their low bytes as two float16, and their high ones."""


@triton.jit
def decode_byte(byte):
    """One e4m3 number (not NaN) in the low bits of int32 as float32, without instructions of its own."""
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256


@triton.jit
def decode(words, PLAIN: tl.constexpr):
    """The low and the high bytes of words of 16 bits, e4m3, as two float16 tiles. PLAIN: as float32."""
    if PLAIN:
        wide = words.to(tl.int32)
        return decode_byte(wide & 0xFF), decode_byte((wide >> 8) & 0xFF)
    return tl.inline_asm_elementwise(
        DECODE, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
    )


@triton.jit(do_not_specialize=["splits", "group"])
def fp8_split_kernel(
    query_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    scale,
    tokens,
    splits,
    group,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Softmax sums of one split (axis 0) of a (batch, KV head) (axis 1), BH in all.

    query: [BH, group, D]; k, v: [BH, tokens, D / 2] int16, two channels a word; o: [BH, splits, group, D]
    float32 with even channels first, m and l: [BH, splits, group] float32, written. scale: on the scores of
    the bytes, in units of log 2. ROWS: group or more, at least 16. CHAINED: the merge may start before this
    ends. PLAIN: in float32.
    """
    split, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(tokens, TILE)
    begin = split * tiles // splits * TILE
    end = tl.minimum((split + 1) * tiles // splits * TILE, tokens)
    HALF: tl.constexpr = D // 2
    KIND: tl.constexpr = tl.float32 if PLAIN else tl.float16
    row, word = tl.arange(0, ROWS), tl.arange(0, HALF)
    asked = (row < group)[:, None]
    query_at = query_ptr + (head * group + row[:, None]) * D + 2 * word[None, :]
    q_even = tl.load(query_at, mask=asked, other=0.0).to(KIND)
    q_odd = tl.load(query_at + 1, mask=asked, other=0.0).to(KIND)
    k_ptr += head * tokens * HALF
    v_ptr += head * tokens * HALF
    m = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    even, odd = tl.zeros([ROWS, HALF], tl.float32), tl.zeros([ROWS, HALF], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + tl.arange(0, TILE)
        live = at < end
        k = tl.load(k_ptr + at[None, :] * HALF + word[:, None], mask=live[None, :], other=0)
        k_even, k_odd = decode(k, PLAIN)
        s = tl.dot(q_even, k_even, input_precision="ieee")
        s = tl.dot(q_odd, k_odd, s, input_precision="ieee") * scale
        s = tl.where(live[None, :], s, float("-inf"))
        highest = tl.maximum(m, tl.max(s, 1))
        old = tl.exp2(m - highest)
        p = tl.exp2(s - highest[:, None])
        total = total * old + tl.sum(p, 1)
        p = p.to(KIND)
        v = tl.load(v_ptr + at[:, None] * HALF + word[None, :], mask=live[:, None], other=0)
        v_even, v_odd = decode(v, PLAIN)
        even = tl.dot(p, v_even, even * old[:, None], input_precision="ieee")
        odd = tl.dot(p, v_odd, odd * old[:, None], input_precision="ieee")
        m = highest
    if CHAINED:
        gdc_launch_dependents()
    slot = (head * splits + split) * group + row
    sums_at = o_ptr + slot[:, None] * D + word[None, :]
    tl.store(sums_at, even, mask=asked)
    tl.store(sums_at + HALF, odd, mask=asked)
    tl.store(m_ptr + slot, m, mask=row < group)
    tl.store(l_ptr + slot, total, mask=row < group)


@triton.jit(do_not_specialize=["splits", "group"])
def fp8_merge_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    out_ptr,
    scale,
    splits,
    group,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Join the splits of one query head (axis 0 of the grid), CHANNELS of its sums (axis 1).

    o, m, l: from `fp8_split_kernel`; out: [BH, group, D], written; scale: that of the values. SPLITS: a power
    of two, `splits` or more. CHAINED: this launch may have begun before the splits were done.
    """
    asked, channel = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.arange(0, SPLITS)
    live = split < splits
    slot = (asked // group * splits + split).to(tl.int64) * group + asked % group
    if CHAINED:
        gdc_wait()
    m = tl.load(m_ptr + slot, mask=live, other=-1e30)
    total = tl.load(l_ptr + slot, mask=live, other=0.0)
    parts = tl.load(o_ptr + slot[:, None] * D + channel[None, :], mask=live[:, None], other=0.0)
    weight = tl.exp2(m - tl.max(m, 0))
    out = tl.sum(parts * weight[:, None], 0) * (scale / tl.sum(total * weight, 0))
    place = 2 * (channel % (D // 2)) + channel // (D // 2)
    tl.store(out_ptr + asked.to(tl.int64) * D + place, out.to(out_ptr.dtype.element_ty))
