"""The plan of a decode step in plain PyTorch; see `quantpress.kernels.steps.plan_decodes`."""

import torch
from torch import Tensor

from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.kernels.steps.operands import (
    NEWEST,
    NULL_BLOCK,
    RECENT_TOKENS,
    BlockMaps,
    StepBuffers,
    StepRequests,
)


def newest_blocks(requests: StepRequests) -> tuple[Tensor, Tensor, Tensor]:
    """The two newest blocks of each request.

    Returns:
        Blocks [R, 2] int64, the position [R, 2] of the first token of each, and whether the step writes to it
        [R, 2] bool.
    """
    length, count = requests.lengths.long(), requests.starts.diff().long()
    last = (length - 1) // PAGE_TOKENS
    number = last.unsqueeze(1) + torch.arange(1 - NEWEST, 1, device=last.device)
    blocks = requests.block_table.gather(1, number.clamp(min=0)).long()
    first = number * PAGE_TOKENS
    real = (length > 0) & (count > 0) & (requests.block_table[:, 0] != NULL_BLOCK)
    written = real.unsqueeze(1) & (number >= 0) & (blocks != NULL_BLOCK)
    written &= first + PAGE_TOKENS > (length - count).unsqueeze(1)
    return blocks, first, written


def begin_blocks(maps: BlockMaps, requests: StepRequests) -> Tensor:
    """Give the blocks that begin in this step the pages of their requests' slots.

    Returns:
        [R, 2] int64, recent pages of the two newest blocks of each request, or -1 where the step does not
        write to the block.
    """
    assert requests.slots is not None
    blocks, first, written = newest_blocks(requests)
    before = (requests.lengths - requests.starts.diff()).long().unsqueeze(1)
    own = requests.slots.unsqueeze(1) * NEWEST + (first // PAGE_TOKENS).clamp(min=0) % NEWEST
    maps.begin(blocks.flatten(), own.flatten(), (written & (first >= before)).flatten())
    return own.where(written, -1)


def plan_decodes_reference(
    maps: BlockMaps, requests: StepRequests, out: StepBuffers, written: Tensor
) -> None:
    """Write the plan of the decodes; the pages of the newest blocks are given already."""
    rows, q = requests.decodes, requests.queries
    table, length = requests.block_table[:rows], requests.lengths[:rows].long()
    before = length - requests.starts[: rows + 1].diff().long()
    last = (length - 1) // PAGE_TOKENS
    number = last.unsqueeze(1) + torch.arange(1 - NEWEST, 1, device=last.device)
    pages = maps.pages(table.gather(1, number.clamp(min=0)).long())
    kept = ((length - RECENT_TOKENS) // PAGE_TOKENS < last) & (last > 0) & (pages[:, 0] >= 0)
    packed = (last - kept.long()).clamp(min=0) * PAGE_TOKENS
    entries = maps.entries(table[:, 0].long())
    maps.used[entries] = requests.step  # -1 is nobody's element
    sinks = torch.where((packed > 0) & (entries >= 0), maps.sinks, 0)
    out.packed_starts[:rows], out.sink_lengths[:rows] = sinks.unsqueeze(1), sinks.unsqueeze(1)
    out.packed_lengths[:rows] = (packed - sinks).unsqueeze(1)
    out.recent_lengths[:rows] = (length - packed).clamp(min=0).unsqueeze(1)
    out.sink_table[:rows] = entries.clamp(min=0).unsqueeze(1)
    newest = pages[:, 1]
    out.recent_table[:rows] = torch.stack((pages[:, 0].where(kept, newest), newest), 1).clamp(min=0)
    filled = before.clamp(min=0) // PAGE_TOKENS
    page = written[:rows].gather(1, (filled == last).long().unsqueeze(1)).squeeze(1)
    fills = (length // PAGE_TOKENS > before // PAGE_TOKENS) & (page >= 0)
    out.full_pages[:rows] = page.where(fills, -1)
    out.full_blocks[:rows] = table.gather(1, filled.unsqueeze(1)).squeeze(1).where(fills, -1)
    of_block, of_head = out.steps
    first = torch.arange(out.kv_heads, dtype=torch.int32, device=table.device) * of_head
    pool_rows = out.table[:rows, :, : table.shape[1]]
    torch.add(first.view(1, -1, 1), table.unsqueeze(1), alpha=of_block, out=pool_rows)

    position = length.unsqueeze(1) + torch.arange(q, device=table.device) - q  # of row i of a request
    which = (position // PAGE_TOKENS - last.unsqueeze(1) + NEWEST - 1).clamp(0, NEWEST - 1)
    page = written[:rows].gather(1, which)
    live = (position >= before.unsqueeze(1)) & (position >= 0) & (page >= 0)
    entry = entries.unsqueeze(1)
    recent = (page * PAGE_TOKENS + position % PAGE_TOKENS).where(live, -1).flatten()
    at_sinks = live & (position < maps.sinks) & (entry >= 0)
    first = (entry * maps.sinks + position).where(at_sinks, -1).flatten()
    tokens = rows * q if requests.rows is None else len(requests.rows)
    for buffer, values in zip(out.of_tokens(tokens), (recent, first), strict=True):
        buffer.copy_(values if requests.rows is None else values[requests.rows])
