"""Divides the programs of the split kernel among heads with page tables (Triton).

`quantpress.kernels.attend.split_mma` computes the same by itself where it is given no schedule.
"""

import triton
import triton.language as tl


@triton.jit
def chunks_of_heads(
    used_ptr,
    starts_ptr,
    heads,
    pages,
    programs,
    HEADS: tl.constexpr,
    STARTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Divide programs among heads by the pages that each head has in use.

    used_ptr: [heads] int32, tokens in use; starts_ptr: [heads] int32, the first of them, if STARTS; pages: P
    of the longest head; programs: how many there are, more than `heads`; HEADS: a power of two, at least
    `heads`; TOKENS: of a page.

    Returns three tensors [HEADS]: the first page in use of each head, how many pages it has in use, and its
    chunks, one for each of its programs, among which its pages are divided evenly. Programs belong to heads
    in order, and there are at most `programs` chunks.
    """
    head = tl.arange(0, HEADS)
    used = tl.load(used_ptr + head, mask=head < heads, other=0)
    start = 0 * used
    if STARTS:
        start = tl.load(starts_ptr + head, mask=head < heads, other=0)
    begin = start // TOKENS
    end = tl.minimum(start + used, pages * TOKENS)
    there = tl.where(used > 0, tl.cdiv(end, TOKENS) - begin, 0)
    size = tl.maximum(tl.cdiv(tl.sum(there, 0), programs - heads), 1)
    return begin, there, tl.cdiv(there, size)


@triton.jit
def pages_of_program(
    used_ptr,
    starts_ptr,
    schedule_ptr,
    heads,
    blocks,
    pages,
    USED: tl.constexpr,
    STARTS: tl.constexpr,
    HEADS: tl.constexpr,
    SCHEDULED: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What a program of axis 0 reads, for a kernel with the arguments of `split_plain_kernel`.

    Returns head and block of rows as int64, its first page, one past its last, and the head's first token in
    use and one past its last. With HEADS the first page is not below the last one where it reads none.
    """
    split, splits = tl.program_id(0), tl.num_programs(0)
    if SCHEDULED:
        assigned = schedule_ptr + split * 4
        mine, first, last = tl.load(assigned), tl.load(assigned + 1), tl.load(assigned + 2)
    elif HEADS:
        begin, in_use, chunks = chunks_of_heads(
            used_ptr, starts_ptr, heads, pages, splits, HEADS, STARTS, TOKENS
        )
        index = tl.arange(0, HEADS)
        ends = tl.cumsum(chunks, 0)
        mine = tl.sum((ends <= split).to(tl.int32), 0)
        local = split - tl.sum(tl.where(index < mine, chunks, 0), 0)
        parts = tl.maximum(tl.sum(tl.where(index == mine, chunks, 0), 0), 1)
        there = tl.sum(tl.where(index == mine, in_use, 0), 0)  # 0 for programs that are left over
        skipped = tl.sum(tl.where(index == mine, begin, 0), 0)
        first, last = skipped + local * there // parts, skipped + (local + 1) * there // parts
        mine = tl.minimum(mine, heads - 1)
    if HEADS:
        head = mine.to(tl.int64)
        block = head * blocks + tl.program_id(1)
    else:
        block = tl.program_id(1).to(tl.int64)
        head = block // blocks
    used = pages * TOKENS
    unused = 0
    if USED:
        used = tl.minimum(tl.load(used_ptr + head), used)
    if STARTS:
        unused = tl.load(starts_ptr + head)
        used = tl.minimum(used + unused, pages * TOKENS)
    if not HEADS:
        there = tl.cdiv(used, TOKENS)
        first, last = split * there // splits, (split + 1) * there // splits
    return head, block, first, last, unused, used


@triton.jit(do_not_specialize=["heads", "pages", "programs"])
def schedule_kernel(
    used_ptr,
    starts_ptr,
    page_table_ptr,
    programs_ptr,
    heads_ptr,
    heads,
    pages,
    programs,
    HEADS: tl.constexpr,
    STARTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Write the schedule of SIZE programs (axis 0); see `quantpress.kernels.attend.schedule.PageSchedule`.

    used_ptr: [heads] int32, tokens in use; starts_ptr: [heads] int32, the first of them, if STARTS;
    page_table_ptr: [heads, pages] int32; programs_ptr: [programs, 4] int32, written; heads_ptr: [heads, 2]
    int32, written by program 0; HEADS: a power of two, at least `heads`.
    """
    part = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    head = tl.arange(0, HEADS)
    begin, there, chunks = chunks_of_heads(used_ptr, starts_ptr, heads, pages, programs, HEADS, STARTS, 128)
    ends = tl.cumsum(chunks, 0)
    begins = ends - chunks
    own = (begins[None, :] <= part[:, None]) & (part[:, None] < ends[None, :])
    mine = tl.sum(tl.where(own, head[None, :], 0), 1)
    local = part - tl.sum(tl.where(own, begins[None, :], 0), 1)
    parts = tl.maximum(tl.sum(tl.where(own, chunks[None, :], 0), 1), 1)
    held = tl.sum(tl.where(own, there[None, :], 0), 1)  # 0 for programs that are left over
    skipped = tl.sum(tl.where(own, begin[None, :], 0), 1)
    first, last = skipped + local * held // parts, skipped + (local + 1) * held // parts
    live = part < programs
    page = first
    if STARTS:  # a page whose first tokens are not in use is read last
        start = tl.load(starts_ptr + mine, mask=live, other=0)
        page += ((first * 128 < start) & (last - first > 1)).to(tl.int32)
    at = page_table_ptr + mine.to(tl.int64) * pages + tl.minimum(page, pages - 1)
    pool_row = tl.load(at, mask=live, other=0)
    at = programs_ptr + part * 4
    tl.store(at, mine, mask=live)
    tl.store(at + 1, first, mask=live)
    tl.store(at + 2, last, mask=live)
    tl.store(at + 3, pool_row, mask=live)
    if tl.program_id(0) == 0:
        tl.store(heads_ptr + head * 2, begins, mask=head < heads)
        tl.store(heads_ptr + head * 2 + 1, ends, mask=head < heads)
