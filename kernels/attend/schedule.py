"""How the programs of the split kernel are shared out over pages by table, made once for many calls.

Without, every program of every call finds its share by itself, which takes longer the more heads there are.
"""

import contextlib
from dataclasses import dataclass

import torch

from quantpress.kernels.available import runs_triton

PROGRAMS_AT_A_TIME = 16


@dataclass(frozen=True, eq=False)
class PageShares:
    """Shares of pages, on the device.

    Args:
        programs: [S, 4] int32, for each program: a head out of B * Hkv, its first page of it, the one behind
            its last (the same: nothing to do), and the row of the first.
        heads: [B * Hkv, 2] int32, for each head its first program and the one behind its last.
    """

    programs: torch.Tensor
    heads: torch.Tensor


def page_shares(lengths: torch.Tensor, table: torch.Tensor) -> PageShares | None:
    """The shares for a `PackedSegment`, by one small launch that may be captured.

    Args:
        lengths: [B, Hkv] int32, tokens in use of each head.
        table: [B, Hkv, P] int32.

    Returns:
        None where the Triton kernels do not run, or there are no pages.
    """
    if not runs_triton(table.device) or not table.numel():
        return None
    from quantpress.kernels.attend.triton_attend import programs_at_a_time, shared_programs

    count = shared_programs(table.shape[2], lengths.numel(), programs_at_a_time(table.device))
    return launch_shares(lengths, table, count)


def launch_shares(lengths: torch.Tensor, table: torch.Tensor, count: int) -> PageShares:
    """As `page_shares`, for a number of programs greater than that of heads; by the Triton kernel."""
    from quantpress.kernels.attend.ends import share_kernel

    heads, pages = lengths.numel(), table.shape[2]
    programs, bounds = table.new_empty(count, 4), table.new_empty(heads, 2)
    with torch.cuda.device(table.device) if table.is_cuda else contextlib.nullcontext():
        share_kernel[(-(-count // PROGRAMS_AT_A_TIME),)](
            lengths.contiguous(),
            table.contiguous(),
            programs,
            bounds,
            heads,
            pages,
            count,
            HEADS=max(1 << (heads - 1).bit_length(), 2),
            SIZE=PROGRAMS_AT_A_TIME,
        )
    return PageShares(programs, bounds)
