"""What the layers of one step share: which pages and 16-bit tokens belong to whom, as attention reads it."""

import sys
from dataclasses import dataclass

import torch

from quantpress.cache.paged.pool_side import PoolSize
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend.schedule import PageShares, page_shares
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True, eq=False)
class PagedPlan:
    """Page table and lengths of the sequences of a batch, on the device; made by `PagePool.plan`.

    Args:
        slots: [B] int64, the slot of each sequence.
        in_order: they are all the slots there are, in order.
        table: [B, Hkv, P] int32, rows of the pool's planes.
        sinks: [B, Hkv] int32, tokens in use in front of the pages.
        packed: [B, Hkv] int32, tokens in use in the pages.
        window: [B, Hkv] int32, tokens in use behind them.
        ends: [B] int64, tokens in use in each window.
        shares: how attention shares the pages out over programs; None where its kernels do not run.
        most_queries: query tokens of one call at most, as far as the host knows.
    """

    slots: torch.Tensor
    in_order: bool
    table: torch.Tensor
    sinks: torch.Tensor
    packed: torch.Tensor
    window: torch.Tensor
    ends: torch.Tensor
    shares: PageShares | None
    most_queries: int = sys.maxsize

    @property
    def batch(self) -> int:
        """B."""
        return self.slots.shape[0]

    @property
    def chosen(self) -> torch.Tensor | None:
        """The slots, or None where all of them are meant, in order."""
        return None if self.in_order else self.slots


def paged_plan(
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    page_counts: torch.Tensor,
    slots: torch.Tensor | None,
    size: PoolSize,
    sink_tokens: int,
    most_queries: int,
) -> PagedPlan:
    """Derive a plan by operations on the device only; see `PagePool.plan`.

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
    if slots is not None and (slots.dtype != torch.int64 or slots.shape != (batch,)):
        raise InvalidInputError(
            f"slots are {slots.dtype} {tuple(slots.shape)}; give torch.int64 [{batch}], or None for all"
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
        slots=torch.arange(batch, device=device) if slots is None else slots,
        in_order=slots is None,
        table=table,
        sinks=per_head(sinks),
        packed=lengths,
        window=per_head(window),
        ends=window.long(),
        shares=page_shares(lengths, table),
        most_queries=most_queries,
    )
