"""Scores of the two keys that a page stores beside its codes (Triton), where a codec has them.

The codes are of keys without the mean m of their page, so all scores of a page lack the same q.m. The page's
sink has a score of its own, which takes the place of what its codes would give.
"""

import triton
import triton.language as tl

from quantpress.kernels.padding import padded

PAGE_TOKENS = tl.constexpr(128)


@triton.jit(do_not_specialize=["pages", "rows", "blocks", "kv_heads", "page_table_row"])
def page_scores_kernel(
    query_ptr,
    weight_ptr,
    means_ptr,
    sinks_ptr,
    used_ptr,
    starts_ptr,
    page_table_ptr,
    slots_ptr,
    scores_ptr,
    pages,
    rows,
    blocks,
    kv_heads,
    page_table_row,
    keys_head,
    keys_page,
    scale,
    D: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SHARED: tl.constexpr,
    SLOTS: tl.constexpr,
    USED: tl.constexpr,
    STARTS: tl.constexpr,
    PAGED: tl.constexpr,
):
    """Scores of the keys of SIZE pages (axis 0) for one (batch, KV head, block of R rows) (axis 1).

    query: [BH, rows, D]; weight [BH, D] of the channel transform, if HAS_WEIGHT, read as by `prepare_kernel`;
    means, sinks: keys of each page, transformed, [D] contiguous in any float dtype, both with the strides
    keys_head and keys_page; used, starts [BH] int32 as in `split_mma_kernel`, if USED and STARTS; page_table
    [BH, page_table_row] int32, if PAGED; scale: factor on q.k in units of log 2. Written: scores [N, pages,
    2, R] float32, of mean and sink, for pages with a token in use.
    """
    block = tl.program_id(1).to(tl.int64)
    head, skipped = block // blocks, block % blocks * R
    page = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    begin, end = 0, pages * PAGE_TOKENS
    if STARTS:
        begin = tl.load(starts_ptr + head)
    if USED:
        end = tl.minimum(begin + tl.load(used_ptr + head), end)
    live = ((page + 1) * PAGE_TOKENS > begin) & (page * PAGE_TOKENS < end)
    if (tl.program_id(0) + 1) * SIZE * PAGE_TOKENS <= begin or tl.program_id(0) * SIZE * PAGE_TOKENS >= end:
        return
    at = page.to(tl.int64)
    if PAGED:
        at = tl.load(page_table_ptr + head * page_table_row + page, mask=live, other=0).to(tl.int64)
    channel = tl.arange(0, padded(D))
    there = channel < D
    both = live[:, None] & there[None, :]
    from_page = head * keys_head + at[:, None] * keys_page + channel[None, :]
    means = tl.load(means_ptr + from_page, mask=both, other=0.0).to(tl.float32)
    sinks = tl.load(sinks_ptr + from_page, mask=both, other=0.0).to(tl.float32)
    factor = tl.full([padded(D)], scale, tl.float32)
    if HAS_WEIGHT:
        own = head
        if SLOTS:
            own = tl.load(slots_ptr + head // kv_heads) * kv_heads + head % kv_heads
        if SHARED:
            own = head % kv_heads
        factor = factor / tl.load(weight_ptr + own * D + channel, mask=there, other=1.0)
    for row in range(tl.minimum(R, rows - skipped)):
        from_row = query_ptr + (head * rows + skipped + row) * D + channel
        q = tl.load(from_row, mask=there, other=0.0).to(tl.float32) * factor
        to = scores_ptr + (block * pages + page) * (2 * R) + row
        tl.store(to, tl.sum(means * q[None, :], 1), mask=live)
        tl.store(to + R, tl.sum(sinks * q[None, :], 1), mask=live)
