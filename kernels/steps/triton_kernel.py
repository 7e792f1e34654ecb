# mypy: allow-untyped-defs
"""The plan of a decode step (Triton); see `quantpress.kernels.steps.plan_decodes`."""

import triton
import triton.language as tl

PAGE_TOKENS = tl.constexpr(128)


@triton.jit
def _newest(length, count, table_ptr, row, stride, live, back: tl.constexpr):
    """The block `back` before the newest one: its number, itself, and whether the step writes to it."""
    number = (length - 1 + PAGE_TOKENS) // PAGE_TOKENS - 1 - back
    block = tl.load(table_ptr + row * stride + tl.maximum(number, 0), mask=live, other=0)
    written = (number >= 0) & ((number + 1) * PAGE_TOKENS > length - count)
    return number, block, written


_NUMBERS = ["requests", "decodes", "queries", "step", "stride", "pages", "width", "of_head", "sinks"]


@triton.jit(do_not_specialize=_NUMBERS)
def plan_decodes_kernel(
    starts_ptr,
    lengths_ptr,
    block_table_ptr,
    slots_ptr,
    page_of_ptr,
    block_of_ptr,
    entry_of_ptr,
    first_of_ptr,
    used_ptr,
    table_ptr,
    packed_starts_ptr,
    packed_lengths_ptr,
    sink_table_ptr,
    sink_lengths_ptr,
    recent_table_ptr,
    recent_lengths_ptr,
    full_pages_ptr,
    full_blocks_ptr,
    written_ptr,
    recent_rows_ptr,
    sink_rows_ptr,
    requests,
    decodes,
    queries,
    step,
    stride,
    pages,
    width,
    of_head,
    sinks,
    RECENT: tl.constexpr,
    OF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Plan all requests (program 0), or copy the block table of a decode (the others, a request each).

    The pointers are the tensors of `BlockMaps`, `StepRequests` and `StepBuffers`, of these dtypes and
    contiguous but for the rows of block_table, `stride` apart; pages: of a row that are copied; width: of a
    row of `table`; of_head, OF_BLOCK: rows of the pool from head to head and from block to block; RECENT:
    tokens read in 16 bits; ROWS: a power of two, at least `requests`; PAGES: copied at a time.
    """
    program = tl.program_id(0)
    if program > 0:
        row = (program - 1).to(tl.int64)
        for begin in range(0, pages, PAGES):
            page = begin + tl.arange(0, PAGES)
            there = page < pages
            block = tl.load(block_table_ptr + row * stride + page, mask=there, other=0)
            for head in tl.static_range(HEADS):
                at = table_ptr + (row * HEADS + head) * width + page
                tl.store(at, block * OF_BLOCK + head * of_head, mask=there)
        return
    row = tl.arange(0, ROWS)
    live = row < requests
    length = tl.load(lengths_ptr + row, mask=live, other=0)
    count = tl.load(starts_ptr + row + 1, mask=live, other=0) - tl.load(starts_ptr + row, mask=live, other=0)
    slot = tl.load(slots_ptr + row, mask=live, other=0)
    number, block, written = _newest(length, count, block_table_ptr, row, stride, live, 0)
    earlier, earlier_block, earlier_written = _newest(length, count, block_table_ptr, row, stride, live, 1)
    first = tl.load(block_table_ptr + row * stride, mask=live, other=0)
    real = live & (length > 0) & (count > 0) & (first != 0)
    written, earlier_written = written & real & (block != 0), earlier_written & real & (earlier_block != 0)
    own, earlier_own = slot * 2 + number % 2, slot * 2 + tl.maximum(earlier, 0) % 2
    before = length - count
    begun, earlier_begun = written & (number * 128 >= before), earlier_written & (earlier * 128 >= before)
    tl.store(page_of_ptr + block, own.to(tl.int32), mask=begun)
    tl.store(block_of_ptr + own, block, mask=begun)
    tl.store(page_of_ptr + earlier_block, earlier_own.to(tl.int32), mask=earlier_begun)
    tl.store(block_of_ptr + earlier_own, earlier_block, mask=earlier_begun)
    page, earlier_page = tl.where(written, own, -1), tl.where(earlier_written, earlier_own, -1)
    tl.store(written_ptr + row * 2, earlier_page, mask=live)
    tl.store(written_ptr + row * 2 + 1, page, mask=live)
    tl.debug_barrier()  # what follows reads the pairs that other threads have made

    live = row < decodes
    held = tl.load(page_of_ptr + block, mask=live, other=-1)
    there = live & (held >= 0)
    held = tl.where(there & (tl.load(block_of_ptr + held, mask=there, other=-1) == block), held, -1)
    earlier_held = tl.load(page_of_ptr + earlier_block, mask=live, other=-1)
    there = live & (earlier_held >= 0)
    found = tl.load(block_of_ptr + earlier_held, mask=there, other=-1) == earlier_block
    earlier_held = tl.where(there & found, earlier_held, -1)
    entry = tl.load(entry_of_ptr + first, mask=live, other=-1)
    there = live & (entry >= 0)
    entry = tl.where(there & (tl.load(first_of_ptr + entry, mask=there, other=-1) == first), entry, -1)
    tl.store(used_ptr + entry, step + 0 * entry, mask=live & (entry >= 0))
    kept = (number > 0) & (length - RECENT < number * 128) & (earlier_held >= 0)
    packed = tl.maximum(number - kept.to(tl.int32), 0) * 128
    skipped = tl.where((packed > 0) & (entry >= 0), sinks, 0)
    recent = tl.maximum(length - packed, 0)
    for head in tl.static_range(HEADS):
        at = row * HEADS + head
        tl.store(packed_starts_ptr + at, skipped, mask=live)
        tl.store(packed_lengths_ptr + at, packed - skipped, mask=live)
        tl.store(sink_lengths_ptr + at, skipped, mask=live)
        tl.store(recent_lengths_ptr + at, recent, mask=live)
    tl.store(sink_table_ptr + row, tl.maximum(entry, 0), mask=live)
    tl.store(recent_table_ptr + row * 2, tl.maximum(tl.where(kept, earlier_held, held), 0), mask=live)
    tl.store(recent_table_ptr + row * 2 + 1, tl.maximum(held, 0), mask=live)
    filled = tl.maximum(before, 0) // 128
    newest = filled == number
    full_page = tl.where(newest, page, earlier_page)
    fills = (length // 128 > filled) & (full_page >= 0)
    tl.store(
        full_pages_ptr + row,
        tl.where(fills, full_page, -1).to(tl.int32),
        mask=live,
    )
    tl.store(full_blocks_ptr + row, tl.where(fills, tl.where(newest, block, earlier_block), -1), mask=live)
    for i in range(queries):
        position = length - queries + i
        stored = tl.where(position >= number * 128, page, earlier_page)
        put = (position >= before) & (position >= 0) & (stored >= 0)
        at = row * queries + i
        tl.store(
            recent_rows_ptr + at, tl.where(put, stored * 128 + position % 128, -1).to(tl.int32), mask=live
        )
        sink = put & (position < sinks) & (entry >= 0)
        tl.store(sink_rows_ptr + at, tl.where(sink, entry * sinks + position, -1), mask=live)
