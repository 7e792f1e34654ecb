"""Which program of the split kernel reads which pages, where heads have page tables.

A schedule is made once for many calls. Without one, every program of every call works out its own pages,
which takes longer the more heads there are.
"""

import contextlib
from dataclasses import dataclass

import torch

from quantpress.kernels.available import FUSED, runs_triton

PROGRAMS = 8
"""Programs of the split kernel, of one warp each, that a multiprocessor holds: 255 registers a thread."""

SCHEDULE_TILE = 16
"""Programs whose pages one program of `schedule_kernel` works out."""


@dataclass(frozen=True, eq=False)
class PageSchedule:
    """Pages of every program, on the device.

    Args:
        programs: [S, 4] int32, for each program its head out of B * Hkv, its first page of that head, one
        past
            its last page (equal to the first where it has no pages), and the row of its first page in the
            pool.
        heads: [B * Hkv, 2] int32, for each head its first program and one past its last.
    """

    programs: torch.Tensor
    heads: torch.Tensor


def page_schedule(lengths: torch.Tensor, table: torch.Tensor) -> PageSchedule | None:
    """Make the schedule of a `PackedSegment` by one small launch, which a CUDA graph may capture.

    Args:
        lengths: [B, Hkv] int32, tokens in use of each head.
        table: [B, Hkv, P] int32, the segment's page table.

    Returns:
        The schedule, or None where the Triton kernels do not run or there are no pages.
    """
    if not runs_triton(table.device) or not table.numel():
        return None
    count = scheduled_programs(table.shape[2], lengths.numel(), programs_at_a_time(table.device))
    return launch_schedule(lengths, table, count)


def launch_schedule(lengths: torch.Tensor, table: torch.Tensor, count: int) -> PageSchedule:
    """Make a schedule by the Triton kernel, whatever the device.

    Args:
        lengths: as for `page_schedule`.
        table: as for `page_schedule`.
        count: S, the number of programs; more than B * Hkv.
    """
    from quantpress.kernels.attend.schedule_kernel import schedule_kernel

    heads, pages = lengths.numel(), table.shape[2]
    programs, bounds = table.new_empty(count, 4), table.new_empty(heads, 2)
    with torch.cuda.device(table.device) if table.is_cuda else contextlib.nullcontext():
        schedule_kernel[(-(-count // SCHEDULE_TILE),)](
            lengths.contiguous(),
            table.contiguous(),
            programs,
            bounds,
            heads,
            pages,
            count,
            HEADS=max(1 << (heads - 1).bit_length(), 2),
            SIZE=SCHEDULE_TILE,
            **FUSED,
        )
    return PageSchedule(programs, bounds)


def programs_at_a_time(device: torch.device) -> int:
    """How many programs of the split kernel a GPU runs at a time."""
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def scheduled_programs(pages: int, heads: int, programs: int) -> int:
    """Number of programs that heads with page tables are given together, for each block of rows.

    Args:
        pages: P, the most pages of a head.
        heads: B * Hkv.
        programs: programs that run at a time for each block of rows.
    """
    return min(max(programs, 2 * heads), (pages + 1) * heads)
