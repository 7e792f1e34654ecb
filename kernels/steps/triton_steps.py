"""Launches the kernel that makes the plan of a decode step."""

import contextlib

import torch
from torch import Tensor

from quantpress.kernels.available import FUSED
from quantpress.kernels.steps.operands import NEWEST, RECENT_TOKENS, BlockMaps, StepBuffers, StepRequests

MOST_REQUESTS = 4096
"""Requests of one step; one program holds them all."""

PAGES = 1024
"""Entries of a block table that are copied at a time."""


def supports_plan(requests: StepRequests) -> bool:
    """Whether the kernel takes these requests: with slots, and decodes of one length."""
    return requests.slots is not None and requests.uniform and requests.lengths.shape[0] <= MOST_REQUESTS


def plan_decodes_triton(maps: BlockMaps, requests: StepRequests, out: StepBuffers) -> Tensor:
    """As `quantpress.kernels.steps.plan_decodes`, for requests that `supports_plan` accepts."""
    from quantpress.kernels.steps.triton_kernel import plan_decodes_kernel

    count, table = requests.lengths.shape[0], requests.block_table
    if table.stride(1) != 1:
        table = table.contiguous()
    recent, first = out.of_tokens(requests.decodes * requests.queries)
    rows = max(16, 1 << (count - 1).bit_length())
    written = out.written if count <= out.written.shape[0] else out.written.new_empty(count, NEWEST)
    with torch.cuda.device(table.device) if table.is_cuda else contextlib.nullcontext():
        plan_decodes_kernel[(1 + requests.decodes,)](
            requests.starts,
            requests.lengths,
            table,
            requests.slots,
            maps.page_of,
            maps.block_of,
            maps.entry_of,
            maps.first_of,
            maps.used,
            out.table,
            out.packed_starts,
            out.packed_lengths,
            out.sink_table,
            out.sink_lengths,
            out.recent_table,
            out.recent_lengths,
            out.full_pages,
            out.full_blocks,
            written,
            recent,
            first,
            count,
            requests.decodes,
            requests.queries,
            requests.step,
            table.stride(0),
            min(table.shape[1], out.table.shape[2]),
            out.table.shape[2],
            out.steps[1],
            maps.sinks,
            RECENT=RECENT_TOKENS,
            OF_BLOCK=out.steps[0],
            HEADS=out.kv_heads,
            ROWS=rows,
            PAGES=PAGES,
            num_warps=4 if rows <= 512 else 8,
            **FUSED,
        )
    return written[:count]
