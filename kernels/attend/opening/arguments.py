"""What the kernels are told of the 16-bit tokens around packed ones, and which programs attend these."""

from dataclasses import dataclass
from typing import Any

import torch

from quantpress.kernels.attend.operands import DenseSegment


@dataclass(frozen=True)
class Opening:
    """Arguments of the split kernel with which it prepares its queries and attends the 16-bit tokens.

    Args:
        pointers: tensors, in the order of the kernel.
        numbers: numbers, in the order of the kernel.
        constants: what is compiled in.
        beside: programs on the first axis of the grid that attend no packed tokens.
    """

    pointers: list[torch.Tensor | None]
    numbers: list[float]
    constants: dict[str, Any]
    beside: int


NOTHING = Opening(
    [None] * 18,
    [0.0] * 2 + [0] * 18,
    dict.fromkeys(
        ("OPENS", "TILE", "HAS_WEIGHT", "HAS_MEAN", "SHARED", "SLOTS", "FIRST_USED", "RECENT_USED"), 0
    )
    | dict.fromkeys(("FIRST_STARTS", "RECENT_STARTS", "FIRST_PAGE", "RECENT_PAGE"), 0),
    0,
)
"""Where another kernel has done this."""


@dataclass(frozen=True)
class DenseArguments:
    """The 16-bit tokens before and after the packed ones.

    Args:
        pointers: keys and values of both, then used, starts and tables, two each.
        tokens: number of tokens of each.
        strides: of the tables from row to row, then of the pools from page to page and from head to head.
        constants: which of these there are, and the tokens of a page.
    """

    pointers: list[torch.Tensor | None]
    tokens: list[int]
    strides: list[int]
    constants: dict[str, Any]


def dense_arguments(
    query: torch.Tensor, before: DenseSegment | None, after: DenseSegment | None
) -> DenseArguments:
    """The arguments for 16-bit tokens; the query stands in for keys and values where there are none."""
    ends = (before, after)
    used = [None if one is None else contiguous(one.lengths) for one in ends]
    starts = [None if one is None else contiguous(one.starts) for one in ends]
    tables = _by_table(before, after)
    rows = [None if one is None or one.table is None else _rows(one.table) for one in tables]
    pages = [0 if one is None else one.keys.shape[2] for one in tables]
    strides = [0 if one is None else one.stride(0) for one in rows]
    return DenseArguments(
        [*(states for one in ends for states in _states(query, one)), *used, *starts, *rows],
        [0 if one is None else one.tokens for one in ends],
        strides + [stride for one in tables for stride in _pool_strides(one)],
        {
            "FIRST_USED": used[0] is not None,
            "RECENT_USED": used[1] is not None,
            "FIRST_STARTS": starts[0] is not None,
            "RECENT_STARTS": starts[1] is not None,
            "FIRST_PAGE": pages[0],
            "RECENT_PAGE": pages[1],
        },
    )


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with its elements one after the other, if there is one."""
    return None if tensor is None else tensor.contiguous()


def _states(query: torch.Tensor, segment: DenseSegment | None) -> tuple[torch.Tensor, torch.Tensor]:
    if segment is None:
        return query, query
    if segment.table is not None:  # pools stay where they are, see `supports`
        return segment.keys, segment.values
    return segment.keys.to(query.dtype).contiguous(), segment.values.to(query.dtype).contiguous()


def _by_table(
    before: DenseSegment | None, after: DenseSegment | None
) -> tuple[DenseSegment | None, DenseSegment | None]:
    """The segments of 16-bit tokens by table, each in the other's place where that one is missing."""
    first, recent = (one if one is not None and one.table is not None else None for one in (before, after))
    return first or recent, recent or first


def _rows(table: torch.Tensor) -> torch.Tensor:
    """A page table [B, P] whose rows are contiguous, as those of a slice over P are."""
    return table if table.stride(1) == 1 else table.contiguous()


def _pool_strides(segment: DenseSegment | None) -> tuple[int, ...]:
    """Strides of a segment's pools from page to page and from head to head, keys before values."""
    if segment is None:
        return 0, 0, 0, 0
    return *segment.keys.stride()[:2], *segment.values.stride()[:2]


def tile_tokens(rows: int, head_dim: int) -> int:
    """16-bit tokens that one warp attends at a time, as many as its registers hold.

    Args:
        rows: rows that a program computes.
        head_dim: the larger of keys and values.
    """
    return 32 if rows <= 4 and head_dim <= 128 else 16


def shares(tiles: int, pages: int, splits: int, blocks: int, programs: int) -> tuple[int, int]:
    """How many programs of a block of rows attend 16-bit tokens, and how many of these attend nothing else.

    These are as few programs as end with those for packed tokens, if they find room beside them; else some of
    the programs for packed tokens attend 16-bit tokens first. A tile of 16-bit tokens is taken to need as
    long as a page. With more programs than that at 131072 tokens, the merge took 0.6 us longer on an H200.

    Args:
        tiles: tiles of 16-bit tokens of a head.
        pages: pages of a head.
        splits: programs of a block of rows that attend packed tokens.
        blocks: B * Hkv * blocks of rows.
        programs: programs that the GPU runs at a time.
    """
    fewest = -(-tiles // -(-pages // splits))
    if fewest <= programs // blocks - splits:
        return fewest, fewest
    return min(tiles, splits), 0


def shares_by_table(tiles: int, splits: int, heads: int, programs: int) -> tuple[int, int]:
    """The same where the programs of all heads are on one axis, and a head may have none for packed tokens.

    Args:
        tiles: as for `shares`.
        splits: programs for packed tokens of all heads.
        heads: B * Hkv.
        programs: programs that run at a time for each block of rows.
    """
    parts = min(tiles, max((programs - splits) // heads, 1))
    return parts, parts * heads
