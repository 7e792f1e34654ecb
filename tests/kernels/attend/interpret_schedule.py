"""Run by `test_triton_attend.py` in Triton's interpreter: prints how programs are divided among heads."""

import json

import torch
import triton
import triton.language as tl

from quantpress.kernels.attend.schedule import PageSchedule, launch_schedule, scheduled_programs
from quantpress.kernels.attend.schedule_kernel import chunks_of_heads

PAGES = 40


@triton.jit
def write_chunks(used_ptr, starts_ptr, there_ptr, chunks_ptr, heads, pages, programs, HEADS: tl.constexpr):
    _, there, chunks = chunks_of_heads(used_ptr, starts_ptr, heads, pages, programs, HEADS, True, 128)
    head = tl.arange(0, HEADS)
    tl.store(there_ptr + head, there, mask=head < heads)
    tl.store(chunks_ptr + head, chunks, mask=head < heads)


def chunks(heads: int, most: int, used: torch.Tensor, starts: torch.Tensor) -> list[object]:
    programs = scheduled_programs(PAGES, heads, most)
    there, counts = (torch.empty(heads, dtype=torch.int32) for _ in range(2))
    padded = max(1 << (heads - 1).bit_length(), 2)
    write_chunks[(1,)](used, starts, there, counts, heads, PAGES, programs, HEADS=padded)
    return [programs, there.tolist(), counts.tolist()]


def schedule(heads: int, most: int, used: torch.Tensor, starts: torch.Tensor | None) -> list[object]:
    """What `page_schedule` writes down for pages of a pool in any order."""
    table = torch.randperm(heads * PAGES, dtype=torch.int32).view(1, heads, PAGES)
    found = PageSchedule.empty(heads, scheduled_programs(PAGES, heads, most), table.device)
    launch_schedule(used.view(1, heads), table, None if starts is None else starts.view(1, heads), found)
    begins = 0 * used if starts is None else starts
    return [used.tolist(), begins.tolist(), table[0].tolist(), found.programs.tolist(), found.heads.tolist()]


if __name__ == "__main__":
    for heads, most in [(1, 16), (2, 132), (3, 7), (8, 1056), (8, 64), (24, 100), (64, 1056), (96, 1056)]:
        used = torch.randint(PAGES * 128 + 1, (heads,), dtype=torch.int32)
        starts = (torch.rand(heads) * (PAGES * 128 - used)).int()
        print(json.dumps(chunks(heads, most, used, starts)))
    for heads, tokens in [(8, 0), (8, 1), (256, 5000), (512, 31 * 128)]:
        used = torch.full((heads,), tokens, dtype=torch.int32)
        print(json.dumps(chunks(heads, 1056, used, 0 * used)))
    for heads, most in [(1, 16), (3, 7), (8, 64), (24, 100)]:
        used = torch.randint(PAGES * 128 + 1, (heads,), dtype=torch.int32)
        used[heads // 2] = 0 if heads > 1 else PAGES * 128
        print(json.dumps(schedule(heads, most, used, None)))
        starts = (torch.rand(heads) * (PAGES * 128 - used)).int()
        starts[: heads // 2] %= 128  # sinks in the first page
        print(json.dumps(schedule(heads, most, used, starts)))
