"""Which program of the split kernel reads which pages, where heads have page tables.

A schedule is made once for many calls. Without one, every program of every call works out its own pages,
which takes longer the more heads there are.
"""

import contextlib
from dataclasses import dataclass

import torch

from quantpress.errors import InvalidInputError
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
            past its last page (equal to the first where it has no pages), and the row in the pool of the page
            that it reads first: its first page, or its second where tokens of the first are before the start.
        heads: [B * Hkv, 2] int32, for each head its first program and one past its last.
    """

    programs: torch.Tensor
    heads: torch.Tensor

    @classmethod
    def empty(cls, heads: int, programs: int, device: torch.device) -> "PageSchedule":
        """Buffers for `heads` = B * Hkv heads and S `programs`, see `schedule_programs`; not written yet."""
        shapes = (programs, 4), (heads, 2)
        return cls(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))


def page_schedule(
    lengths: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor | None = None,
    out: PageSchedule | None = None,
) -> PageSchedule | None:
    """Make the schedule of a `PackedSegment` by one small launch, which a CUDA graph may capture.

    Args:
        lengths: [B, Hkv] int32, tokens in use of each head.
        table: [B, Hkv, P] int32, the segment's page table.
        starts: [B, Hkv] int32, the segment's starts, or None.
        out: buffers to write, of `schedule_programs` programs; None: new ones.

    Returns:
        The schedule, or None where the Triton kernels do not run or there are no pages.

    Raises:
        InvalidInputError: `out` has another size.
    """
    heads, count = lengths.numel(), schedule_programs(table)
    if not count:
        return None
    if out is None:
        out = PageSchedule.empty(heads, count, table.device)
    sizes = out.programs.shape[0], out.heads.shape[0]
    if sizes != (count, heads):
        raise InvalidInputError(
            f"the schedule to write is for {sizes[0]} programs and {sizes[1]} heads; "
            f"give PageSchedule.empty({heads}, {count}, device)"
        )
    launch_schedule(lengths, table, starts, out)
    return out


def schedule_programs(table: torch.Tensor) -> int:
    """S, the programs of a schedule for a table [B, Hkv, P]; 0 where `page_schedule` makes none."""
    if not runs_triton(table.device) or not table.numel():
        return 0
    heads, pages = table.shape[0] * table.shape[1], table.shape[2]
    return scheduled_programs(pages, heads, programs_at_a_time(table.device))


def launch_schedule(
    lengths: torch.Tensor, table: torch.Tensor, starts: torch.Tensor | None, out: PageSchedule
) -> None:
    """Make a schedule by the Triton kernel, whatever the device.

    Args:
        lengths: as for `page_schedule`.
        table: as for `page_schedule`.
        starts: as for `page_schedule`.
        out: written, of any number of programs S that is more than B * Hkv.
    """
    from quantpress.kernels.attend.schedule_kernel import schedule_kernel

    heads, pages, count = lengths.numel(), table.shape[2], out.programs.shape[0]
    with torch.cuda.device(table.device) if table.is_cuda else contextlib.nullcontext():
        schedule_kernel[(-(-count // SCHEDULE_TILE),)](
            lengths.contiguous(),
            None if starts is None else starts.contiguous(),
            table.contiguous(),
            out.programs,
            out.heads,
            heads,
            pages,
            count,
            HEADS=max(1 << (heads - 1).bit_length(), 2),
            STARTS=starts is not None,
            SIZE=SCHEDULE_TILE,
            **FUSED,
        )


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
    room = max(heads, min(4 * heads, programs // 32))  # for programs that attend 16-bit tokens
    least = programs - room if programs - room > 2 * heads else max(programs, 2 * heads)
    return min(least, (pages + 1) * heads)
