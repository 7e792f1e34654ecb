"""The plan of a decode step of a serving engine: `plan_decodes`, on the device and into fixed addresses.

operands.py         what is known of blocks, the requests of a step, and the buffers of the plan
reference.py        plain PyTorch: the truth that the kernel is held to
triton_steps.py     launches the kernel of triton_kernel.py
"""

from torch import Tensor

from quantpress.kernels.available import runs_triton
from quantpress.kernels.steps.operands import BlockMaps, StepBuffers, StepRequests
from quantpress.kernels.steps.reference import begin_blocks, plan_decodes_reference

__all__ = ["BlockMaps", "StepBuffers", "StepRequests", "begin_blocks", "plan_decodes"]


def plan_decodes(
    maps: BlockMaps, requests: StepRequests, out: StepBuffers, written: Tensor | None = None
) -> Tensor:
    """Give the newest blocks of all requests their recent pages, and plan what decodes write and read.

    With `RECENT_TOKENS` = 128: the block before the newest one is read from its recent page, if it has one
    and holds some of the last 128 tokens; all blocks before are read packed, but for their first tokens,
    which are read from the sink entry of the request's first block, if there is one.

    Args:
        maps: what is known of the blocks; changed.
        requests: of the step, decodes first.
        out: buffers of the plan, of which the first rows are written.
        written: [R, 2] int64, recent pages of the two newest blocks of each request, or -1 where the step
            does not write to the block: what `begin_blocks` returned. None: it is done here, by slots.

    Returns:
        [R, 2] `written`.
    """
    if written is None and runs_triton(maps.page_of.device):
        from quantpress.kernels.steps.triton_steps import plan_decodes_triton, supports_plan

        if supports_plan(requests):
            return plan_decodes_triton(maps, requests, out)
    if written is None:
        written = begin_blocks(maps, requests)
    plan_decodes_reference(maps, requests, out, written)
    return written
