"""What all layers of one step share: the page table and the lengths of each sequence, for attention."""

import sys
from dataclasses import dataclass

import torch

from quantpress.cache.paged.buffers import PoolSize
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend.schedule import PageSchedule, page_schedule
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class PagedPlan:
    """Page table and lengths of the sequences of a batch, on the device; made by `PagePool.plan`.

    Args:
        sequences: [B] int64, the index of each sequence.
        in_order: whether these are all sequences of the pool, in order.
        table: [B, Hkv, P] int32, rows of the pool's planes.
        sinks: [B, Hkv] int32, tokens in front of the pages.
        packed: [B, Hkv] int32, tokens in the pages.
        window: [B, Hkv] int32, tokens in the window.
        ends: [B] int64, tokens in each window.
        schedule: how attention divides the pages among programs; None if its kernels do not run.
        most_queries: most query tokens of one call, as far as the host knows.
    """

    sequences: torch.Tensor
    in_order: bool
    table: torch.Tensor
    sinks: torch.Tensor
    packed: torch.Tensor
    window: torch.Tensor
    ends: torch.Tensor
    schedule: PageSchedule | None
    most_queries: int = sys.maxsize

    @property
    def batch(self) -> int:
        """B."""
        return self.sequences.shape[0]

    @property
    def chosen(self) -> torch.Tensor | None:
        """[B] int64, the sequences; None if they are all sequences of the pool, in order."""
        return None if self.in_order else self.sequences


def paged_plan(
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    page_counts: torch.Tensor,
    sequences: torch.Tensor | None,
    size: PoolSize,
    sink_tokens: int,
    most_queries: int,
) -> PagedPlan:
    """Compute a plan by operations on the device only; see `PagePool.plan`.

    Raises:
        InvalidInputError: a tensor has the wrong dtype or shape.
    """
    batch = block_tables.shape[0]
    wanted = {"block_tables": (block_tables, 2), "context_lens": (context_lens, 1)}
    for name, (tensor, dims) in {**wanted, "page_counts": (page_counts, 1)}.items():
        if tensor.dtype != torch.int32 or tensor.dim() != dims or tensor.shape[0] != batch:
            shape = f"[{batch}, P]" if dims == 2 else f"[{batch}]"
            raise InvalidInputError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; give torch.int32 {shape}"
            )
    if sequences is not None and (sequences.dtype != torch.int64 or sequences.shape != (batch,)):
        raise InvalidInputError(
            f"sequences are {sequences.dtype} {tuple(sequences.shape)}; give torch.int64 [{batch}], or None "
            "for all"
        )
    device = block_tables.device
    packed = page_counts * PAGE_TOKENS
    sinks = (page_counts > 0).to(torch.int32) * sink_tokens
    window = context_lens - sinks - packed

    def per_head(counts: torch.Tensor) -> torch.Tensor:
        return counts.unsqueeze(1).expand(-1, size.kv_heads).contiguous()

    table = size.rows(block_tables)
    lengths = per_head(packed)
    return PagedPlan(
        sequences=torch.arange(batch, device=device) if sequences is None else sequences,
        in_order=sequences is None,
        table=table,
        sinks=per_head(sinks),
        packed=lengths,
        window=per_head(window),
        ends=window.long(),
        schedule=page_schedule(lengths, table),
        most_queries=most_queries,
    )
