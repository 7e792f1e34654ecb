"""Launches the attention kernels for packed tokens: what they support, their settings, their buffers.

There are two launches whatever the length: the first attends the tokens in splits, packed ones and those in
16 bits, and the second joins the sums. Where `opens_call` says no, one more comes before them, which prepares
the queries and attends the 16-bit tokens. Each further packed segment, which has widths and transforms of
its own, takes as many more; the sums over its tokens are joined with those over 16-bit tokens. Nothing is
tuned at run time; each head_dim and pair of widths compiles once.
"""

import contextlib
import math
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from quantpress.kernels.attend.merge.settings import MERGED, rows_of_merge, warps_by_matrix, warps_of_merge
from quantpress.kernels.attend.opening.arguments import (
    NOTHING,
    DenseArguments,
    Opening,
    contiguous,
    dense_arguments,
    shares,
    shares_by_table,
    tile_tokens,
)
from quantpress.kernels.attend.operands import (
    DenseSegment,
    KernelOperands,
    PackedSegment,
    PackedSide,
    PartOperands,
    ScalarOperands,
    Segment,
    SignOperands,
    Visibility,
)
from quantpress.kernels.attend.parts import launches
from quantpress.kernels.attend.parts.groups import (
    ROWS,
    groups_of,
    lookup_of_groups,
    readable_groups,
    second_part,
    signs_of_groups,
    sketch_of,
    steps_of_groups,
    with_planes,
)
from quantpress.kernels.attend.parts.operands import as_parts, padded_channels
from quantpress.kernels.attend.schedule import (
    PROGRAMS,
    PageSchedule,
    programs_at_a_time,
    scheduled_programs,
)
from quantpress.kernels.available import FUSED, chains
from quantpress.kernels.quick import quick
from quantpress.kernels.rotation_matrix import rotation_matrix
from quantpress.quantization.transform import ChannelTransform

HEAD_DIMS = (64, 128, 256)
WIDTHS = (2, 3, 4, 8)
SIGN_HEAD_DIMS, SIGN_WIDTHS = (64, 128), (1, 2, 3, 4)
"""The same of bit planes."""

MOST_QUERIES = 128
"""Query tokens of one pass. Rows are query heads of a group times query tokens; a program has 8 or 16."""

PAGES_OF_SCORES = 32
"""Pages whose mean and sink a program scores."""

AHEAD_BITS = 6
"""Bits of a key and a value together, from which on starting early was faster."""

FEW_ROWS = 4
"""Rows up to which a program computes no more than these; a product has room for so many."""

DENSE_TILE = 32
"""16-bit tokens per program."""

STAGED_BYTES = 28 * 1024
"""Most shared memory of a program that stages keys and values of 3 bits: words, tables, the system's part."""

MOST_SPLITS = (128, 256)
"""Programs per block of rows: for any length, and where each has at least `PAGES_OF_SPLIT` pages. More would
cost more in the merge than they save."""

PAGES_OF_SPLIT = 3

PLAIN_PROGRAMS = 16
"""Programs of the plain kernel in all."""

LOG2_E = math.log2(math.e)


def supports(query: torch.Tensor, segments: Sequence[Segment], visibility: Visibility) -> bool:
    """Whether the kernels cover this call: causal, packed segments side by side, codes that they read.

    These are codes of 1 to 4 and 8 bits, in one group of channels or two, with or without a sketch; and 2 to
    4 bit planes. At most one dense segment may lie in front of the packed ones, and one behind them.
    Where the last segment has lengths, the tokens of several queries must be among its tokens in use.
    """
    packed = [index for index, segment in enumerate(segments) if isinstance(segment, PackedSegment)]
    inside = packed == [*range(packed[0], packed[-1] + 1)] if packed else False
    if not inside or packed[0] > 1 or len(segments) - packed[-1] > 2 or visibility.dropped is not None:
        return False
    if visibility.mask is not None or not (visibility.causal or query.shape[2] == 1):
        return False
    after = sum(segment.tokens for segment in segments[packed[-1] + 1 :])
    if not _reachable(query, [one for one in segments if isinstance(one, DenseSegment)]):
        return False
    pages = [one for one in segments if isinstance(one, PackedSegment)]
    if not all(_readable(one) or _readable_in_parts(one) for one in pages):
        return False
    return query.shape[2] == 1 or after >= query.shape[2]


def _reachable(query: torch.Tensor, dense: list[DenseSegment]) -> bool:
    """Whether the first kernel reads the 16-bit tokens: all by table, from pools as it wants, or none."""
    by_table = [segment for segment in dense if segment.table is not None]
    pools = [pool for segment in by_table for pool in (segment.keys, segment.values)]
    return len(by_table) in (0, len(dense)) and all(
        pool.dtype == query.dtype and pool.stride(3) == 1 and pool.stride(2) == pool.shape[3]
        for pool in pools
    )


def _readable(pages: PackedSegment) -> bool:
    """Whether int8 tensor cores read keys and values."""
    return all(_readable_side(side) for side in (pages.keys, pages.values))


def _readable_side(side: PackedSide) -> bool:
    operands = side.codec.kernel_operands()
    if side.transform.order is not None:
        return False
    if isinstance(operands, SignOperands):
        return operands.bits in SIGN_WIDTHS and operands.head_dim in SIGN_HEAD_DIMS
    if not isinstance(operands, ScalarOperands):
        return False
    fits = operands.bits in WIDTHS and (operands.bits < 8 or not operands.fine)
    return fits and operands.head_dim in HEAD_DIMS


def _readable_in_parts(pages: PackedSegment) -> bool:
    """Whether 16-bit tensor cores read keys and values."""
    sides = (pages.keys, pages.values)
    found = [side.codec.kernel_operands() for side in sides]
    parts = [None if one is None else as_parts(one) for one in found]
    shift = pages.values.transform.mean is not None or pages.values.transform.weight is not None
    return not shift and all(one is not None and one.head_dim in HEAD_DIMS for one in parts)


def attend_triton(
    query: torch.Tensor,
    segments: Sequence[Segment],
    visibility: Visibility,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plain: bool = False,
    newer: int = 0,
) -> torch.Tensor:
    """As `quantpress.kernels.attend.attend`, for calls that `supports` accepts.

    More than `MOST_QUERIES` query tokens go in passes of equal size, each of which reads all tokens.

    Args:
        query: [B, Hq, Tq, D].
        segments: the tokens in order.
        visibility: one that `supports` accepts.
        scaling: factor on q.k.
        softcap: as for `attend`.
        sinks: as for `attend`.
        slots: as for `attend`.
        out: as for `attend`.
        plain: compute in float32 with plain loads, for Triton's interpreter.
        newer: tokens in use at the end that none of these queries sees: those of later passes.

    Returns:
        [B, Hq, Tq, Dv] in the query's dtype.
    """
    if query.shape[2] > MOST_QUERIES:
        bounds = pass_bounds(query.shape[2])
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        options |= {"slots": slots, "plain": plain}
        parts = [
            attend_triton(query[:, :, low:high], segments, visibility, newer=query.shape[2] - high, **options)
            for low, high in pairwise(bounds)
        ]
        return torch.cat(parts, 2, out=out)
    before, after = (one if isinstance(one, DenseSegment) else None for one in (segments[0], segments[-1]))
    packed = [one for one in segments if isinstance(one, PackedSegment)]
    cap = 0.0 if softcap is None else softcap * LOG2_E
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        calls = [_call(query, one, plain)(query, one, slots, scaling * LOG2_E, cap, plain) for one in packed]
        for one in calls:
            one.cut(min(other.block for other in calls))
        *others, call = calls
        prepared, dense = call.first(before, after, newer, len(others))
        for number, other in enumerate(others, dense[0].shape[1] - len(others)):
            other.merge(other.attend(other.first()[0]), dense, into=number)
        return call.merge(call.attend(prepared), dense, sinks, out)


class _Call:
    """Shapes and buffers of one call.

    A row is a query head of the group and a query token of a KV head; a block of rows shares its programs.

    Args:
        query: [B, Hq, Tq, D].
        packed: the packed segment.
        slots: as for `attend`.
        scale: factor on q.k, in units of log 2.
        softcap: in units of log 2; 0 for none.
        plain: compute in float32 with plain loads, for Triton's interpreter.
    """

    def __init__(
        self,
        query: torch.Tensor,
        packed: PackedSegment,
        slots: torch.Tensor | None,
        scale: float,
        softcap: float,
        plain: bool,
    ) -> None:
        self.packed, self.scale, self.softcap, self.plain = packed, scale, softcap, plain
        self.slots = contiguous(slots)
        self.batch, self.query_heads, self.queries, dim = query.shape
        self.kv_heads = packed.kv_heads
        self.heads = self.batch * self.kv_heads
        self.group = self.query_heads // self.kv_heads
        self.rows = self.group * self.queries
        self.query = query.reshape(self.heads, self.rows, dim).contiguous()
        self.keys, self.values = self._operands()
        self.used, self.starts = contiguous(packed.lengths), contiguous(packed.starts)
        self.table = packed.table if packed.table is None else _in_rows(packed.table)
        self.pages = packed.pages
        self.padded = 0 if self.table is None else max(1 << (self.heads - 1).bit_length(), 2)
        self.scheduled_heads = 1 if self.table is None else self.heads  # heads on axis 0 of the grid
        self.schedule: PageSchedule | None = None
        self.page_scores: torch.Tensor | None = None
        self.chained = not plain and chains(query.device)
        self.early = {"launch_pdl": True} if self.chained else {}
        self.options = FUSED | self.early
        self.cut(self._block_rows())

    def cut(self, block: int) -> None:
        """How many rows are a block. Calls whose sums become one output have the same number."""
        self.block, self.blocks = block, -(-self.rows // block)
        self.computed = FEW_ROWS if self.rows <= FEW_ROWS else block
        self.opens = self._opens()
        self.ahead = self.opens and self._starts_ahead()

    def _operands(self) -> Any:
        return _operands(self.packed.keys), _operands(self.packed.values)

    def _block_rows(self) -> int:
        return block_rows(self.rows, self.query.shape[-1], most_planes(self.keys, self.values))

    def _opens(self) -> bool:
        return not self.plain and opens_call(self.query, self.keys, self.values, self.computed)

    def _starts_ahead(self) -> bool:
        """Whether launches do what they can before those in front of them end: where it was faster.

        It was timed with pages in rows, at a head_dim of 128 and with four rows.
        """
        sides = self.keys, self.values
        if self.table is not None or self.rows > FEW_ROWS or self.query.shape[-1] != 128:
            return False
        levels = all(isinstance(one, ScalarOperands) and one.bits <= 4 and not one.fine for one in sides)
        return levels and sum(one.bits for one in sides) >= AHEAD_BITS

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def _sums(self, count: int, parts: int, channels: int) -> list[torch.Tensor]:
        """Buffers for weighted sums, largest scores and totals of `parts` programs for each of `count`."""
        rows = count * parts * self.block  # a multiple of 8: each buffer begins at a multiple of 32 bytes
        sizes = (rows * channels, rows, rows)
        weighted, largest, totals = self._new(rows * (channels + 2)).split_with_sizes(sizes)
        shape = (count, self.block, parts)
        return [weighted.view(count, parts, self.block, channels), largest.view(shape), totals.view(shape)]

    def first(
        self,
        before: DenseSegment | None = None,
        after: DenseSegment | None = None,
        newer: int = 0,
        spare: int = 0,
    ) -> tuple[list[torch.Tensor] | Opening, list[torch.Tensor]]:
        """Queries in code space, and the sums over the 16-bit tokens but the last `newer` in use.

        Both are for `attend` to compute where `opens` is true. The last `spare` of the sums are not written:
        they are for `merge` of other calls.
        """
        self.page_scores = self._page_scores() if self.keys.page_keys else None
        ends, transform = dense_arguments(self.query, before, after), self.packed.keys.transform
        constants = ends.constants | {
            "HAS_WEIGHT": transform.weight is not None,
            "HAS_MEAN": transform.mean is not None,
            "SHARED": self._is_shared(transform),
            "SLOTS": self.slots is not None,
        }
        hidden = self.queries - 1 + newer
        return (self._opening if self.opens else self._prepare)(ends, constants, hidden, spare)

    def _opening(
        self, ends: DenseArguments, constants: dict[str, Any], hidden: int, spare: int
    ) -> tuple[Opening, list[torch.Tensor]]:
        """The split kernel's part; it waits for all before it at its top, and the merge waits for it alone.

        So no kernel that was started early still reads or writes the memory of the sums.
        """
        transform, count = self.packed.keys.transform, self.heads * self.blocks
        tile = tile_tokens(self.computed, max(self.keys.head_dim, self.values.head_dim))
        tiles = sum(-(-tokens // tile) for tokens in ends.tokens)
        if self.table is None:
            parts, beside = shares(tiles, self.pages, self.splits, count, self._programs())
        else:
            at_a_time = self._programs() // self.blocks
            parts, beside = shares_by_table(tiles, self.splits, self.heads, at_a_time)
        sums = self._sums(count, parts + spare, self.values.head_dim)
        signs, unit = self._signs()
        pointers = [self.query, transform.weight, transform.mean, signs, *ends.pointers, self.slots, *sums]
        numbers = [self.scale, unit, self.queries, self.kv_heads, *ends.tokens]
        numbers += [parts, beside, parts + spare, hidden, *ends.strides]
        return Opening(pointers, numbers, constants | {"OPENS": True, "TILE": tile}, beside), sums

    def _turned(self) -> list[torch.Tensor | None]:
        """Queries in code space, their factor, what sums begin with, and bias, where the kernel `opens`."""
        return [None] * 4

    def _signs(self) -> tuple[torch.Tensor | None, float]:
        """The keys' rotation as signs with its factor [D], and the unit of their levels."""
        return self.keys.rotation.matrix(self.query.device, torch.float32)[0], self.keys.unit

    def _prepare(
        self, ends: DenseArguments, constants: dict[str, Any], hidden: int, spare: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The first launch of its own."""
        transform, count, filters = self.packed.keys.transform, self.heads * self.blocks, self.keys.filters
        turn = rotation_matrix(self.keys.rotation, self.query.device, inverse=True)
        planes = max(len(filters), 1)
        q = self._new(count, planes, 2 * self.block, self.keys.head_dim, dtype=torch.int8)
        factor, bias = (self._new(count, self.block) for _ in range(2))
        start = self._new(count, 2 * self.block, dtype=torch.int32)
        read = [transform.weight, transform.mean, turn.halves, q, factor, start, bias]
        constants = constants | {"HALVES": len(turn.halves), "FILTERS": sum(filters, ()), "ALONE": False}
        units = self.keys.unit, turn.factor
        return [q, factor, start, bias], self._first_launch(ends, read, units, constants, hidden, spare)

    def _first_launch(
        self,
        ends: DenseArguments,
        read: list[torch.Tensor | None],
        units: tuple[float, float],
        constants: dict[str, Any],
        hidden: int,
        spare: int,
    ) -> list[torch.Tensor]:
        """Sums over the 16-bit tokens, and unless ALONE queries in code space: the last four of `read`."""
        from quantpress.kernels.attend.prepare import prepare_kernel

        dim, value_dim, count = self.keys.head_dim, self.values.head_dim, self.heads * self.blocks
        tiles = [-(-tokens // DENSE_TILE) for tokens in ends.tokens]
        sums = self._sums(count, sum(tiles) + spare, value_dim)
        programs = (0 if constants["ALONE"] else self.block) + sum(tiles)
        if not programs:
            return sums
        quick(prepare_kernel)[(programs, count)](
            self.query,
            *read,
            *ends.pointers,
            self.slots,
            *sums,
            self.scale,
            *units,
            self.rows,
            self.queries,
            self.blocks,
            self.kv_heads,
            *ends.tokens,
            tiles[0],
            sum(tiles) + spare,
            hidden,
            *ends.strides,
            self.softcap,
            D=dim,
            DV=value_dim,
            R=self.block,
            TILE=DENSE_TILE,
            PLANES=len(self.keys.filters),
            PLAIN=self.plain,
            CHAINED=self.chained,
            **constants,
            num_warps=8 if max(dim, value_dim) > 128 else 4,
            **FUSED,
        )
        return sums

    def _page_scores(self) -> torch.Tensor:
        """[N, P, 2, R] float32: scores of the keys that pages store. Launched first: the others overlap."""
        from quantpress.kernels.score.page_scores import page_scores_kernel

        keys, count = self.packed.keys, self.heads * self.blocks
        means, sinks = keys.planes["mean0"], keys.planes["sink0"]
        assert means.stride() == sinks.stride()
        scores = self._new(count, self.pages, 2, self.block)
        quick(page_scores_kernel)[(-(-self.pages // PAGES_OF_SCORES), count)](
            self.query,
            keys.transform.weight,
            means,
            sinks,
            self.used,
            self.starts,
            self.table,
            self.slots,
            scores,
            self.pages,
            self.rows,
            self.blocks,
            self.kv_heads,
            0 if self.table is None else self.table.stride(1),
            *_strides(means),
            self.scale,
            D=self.keys.head_dim,
            R=self.block,
            SIZE=PAGES_OF_SCORES,
            HAS_WEIGHT=keys.transform.weight is not None,
            SHARED=self._is_shared(keys.transform),
            SLOTS=self.slots is not None,
            USED=self.used is not None,
            STARTS=self.starts is not None,
            PAGED=self.table is not None,
            **FUSED,
        )
        return scores

    def _is_shared(self, transform: ChannelTransform) -> bool:
        """Whether the parts of a transform hold for every batch entry, and there may be more than one."""
        one = any(part.shape[0] == 1 for part in transform.tensors().values())
        return one and (self.batch > 1 or self.slots is not None)

    def attend(self, prepared: list[torch.Tensor] | Opening) -> list[torch.Tensor]:
        """Sums over the packed tokens, in code space."""
        opening = prepared if isinstance(prepared, Opening) else NOTHING
        q, factor, start, bias = self._turned() if isinstance(prepared, Opening) else prepared
        sides = (self.packed.keys, self.packed.values)
        codes = [side.planes["codes0"] for side in sides]
        scales = [side.planes["scale0"] for side in sides]
        count, value_dim = self.heads * self.blocks, self.values.head_dim
        grid = (self.splits, count if self.table is None else self.blocks)
        made = None if self.table is None else self.packed.schedule
        self.schedule = made if made is not None and made.programs.shape[0] == self.splits else None
        sums = self._sums(grid[1], grid[0], value_dim * max(len(self.values.filters), 1))
        if not self.plain:
            codes = [plane.view(torch.int32) for plane in codes]
        planes = [codes[0], scales[0], codes[1], scales[1]]
        strides = [stride for plane in planes for stride in _strides(plane)]
        row = 0 if self.table is None else self.table.stride(1)
        numbers = [self.pages, self.heads, self.blocks, row, *strides]
        constants = {
            "D": self.keys.head_dim,
            "DV": value_dim,
            "R": self.block,
            "K_BITS": _groups(self.keys)[0].bits,
            "V_BITS": _groups(self.values)[0].bits,
            "K_SIGNS": isinstance(self.keys, SignOperands),
            "V_SIGNS": isinstance(self.values, SignOperands),
            "USED": self.used is not None,
            "STARTS": self.starts is not None,
            "HEADS": self.padded if self.schedule is None else 1,
            "SCHEDULED": self.schedule is not None,
            "PAGE_KEYS": self.page_scores is not None,
        }
        if self.plain:
            from quantpress.kernels.attend.split_plain import split_plain_kernel

            levels = [
                torch.tensor(side.levels, dtype=torch.float32, device=self.query.device)
                for side in (self.keys, self.values)
            ]
            split_plain_kernel[grid](
                q,
                factor,
                bias,
                self.page_scores,
                *planes,
                *levels,
                self.used,
                self.starts,
                self.table,
                None if self.schedule is None else self.schedule.programs,
                *sums,
                *numbers,
                self.rows,
                self.softcap,
                **constants,
                **FUSED,
            )
        else:
            from quantpress.kernels.attend.split_mma import split_mma_kernel

            constants |= {"K_FINE": self.keys.fine, "V_FINE": self.values.fine}
            steps = self._steps()
            second, second_strides, order, kinds = self._second_parts()
            constants |= kinds
            quick(split_mma_kernel)[(grid[0] + opening.beside, grid[1])](
                self._lookup(),
                q,
                factor,
                start,
                bias,
                self.page_scores,
                *planes,
                *second,
                self.used,
                self.starts,
                self.table,
                None if self.schedule is None else self.schedule.programs,
                order,
                *opening.pointers,
                *sums,
                *numbers,
                *second_strides,
                self.rows,
                self.softcap,
                *opening.numbers,
                **constants,
                **opening.constants,
                ROWS=self.computed,
                HALVES=steps,
                STAGED=stages_words(self.keys, self.values, steps, self.query.device),
                CAPPED=self.softcap > 0,
                CHAINED=self.chained,
                AHEAD=self.ahead,
                num_warps=1,
                maxnreg=255,  # left out, the assembler saves registers for more programs than run at a time
                **self.options,
            )
        return sums

    def _lookup(self) -> torch.Tensor:
        from quantpress.kernels.attend.lookup import lookup_table

        return lookup_table(self.keys.codebook, self.values.codebook, self.query.device)

    def _steps(self) -> int:
        return steps_of_page(self.keys, self.values, self.computed, self.table is not None)

    def _second_parts(self) -> tuple[list[Any], list[Any], torch.Tensor | None, dict[str, Any]]:
        """Planes of second parts of keys and values, their strides, the order of the keys, and kinds."""
        return [None] * 4, [None] * 8, None, {"K2_BITS": 0, "V2_BITS": 0, "SKETCH": False}

    @cached_property
    def splits(self) -> int:
        """Programs for packed tokens: of a block of rows, or by table of all heads."""
        if self.table is None:
            return split_count(self.pages, self.heads * self.blocks, self._programs())
        return scheduled_programs(self.pages, self.heads, self._programs() // self.blocks)

    def _programs(self) -> int:
        """Programs of the split kernel that run at a time."""
        return PLAIN_PROGRAMS if self.plain else programs_at_a_time(self.query.device)

    def _multiprocessors(self) -> int:
        return 1 if self.plain else programs_at_a_time(self.query.device) // PROGRAMS

    def merge(
        self,
        sums: list[torch.Tensor],
        dense: list[torch.Tensor],
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        into: int | None = None,
    ) -> torch.Tensor:
        """Join all sums, those of packed tokens rotated back, into the output.

        With `into`, those of packed tokens alone are joined, and become number `into` of the sums in `dense`.
        """
        value_dim = self.values.head_dim
        out = self._output(dense, out, into)
        splits = sums[0].shape[1]
        turn, unit = self._turn_of_values()
        arguments = (
            *sums,
            *dense,
            sinks,
            turn,
            out,
            None if self.schedule is None else self.schedule.heads,
            splits,
            dense[0].shape[1],
            self.rows,
            self.queries,
            self.group,
            self.kv_heads,
            self.blocks,
            0 if into is None else into,
            unit,
        )
        constants = {
            "DV": value_dim,
            "R": self.block,
            "HAS_SINKS": sinks is not None,
            "SCHEDULED": self.schedule is not None,
            "PARTIAL": into is not None,
            "CHAINED": self.chained,
        }
        if self._merged_by_warps():
            from quantpress.kernels.attend.merge.by_warps import merge_by_warps_kernel

            parts, warps, size, tiles = warps_of_merge(-(-splits // self.scheduled_heads), self.rows)
            quick(merge_by_warps_kernel)[(-(-self.rows * parts // warps), self.heads)](
                *arguments,
                *self._order_of_values(),
                PARTS=parts,
                WARPS=warps,
                SIZE=size,
                TILES=tiles,
                AHEAD=self.ahead,
                num_warps=warps,
                **constants,
                **self._groups_of_values(),
                **self.options,
            )
        else:
            from quantpress.kernels.attend.merge.by_matrix import merge_kernel

            each = rows_of_merge(self.rows, self.heads, self._multiprocessors())
            quick(merge_kernel)[(-(-self.rows // each), self.heads)](
                *arguments,
                self.used,
                self.starts,
                self.heads,
                self.pages,
                PLANES=len(self.values.filters),
                FILTERS=sum(self.values.filters, ()),
                SIZE=MERGED[splits > MERGED[0] * self.scheduled_heads],
                HEADS=self.padded if self.schedule is None else 1,
                STARTS=self.starts is not None,
                EACH=each,
                num_warps=warps_by_matrix(value_dim, len(self.values.filters)),
                **constants,
                **self.options,
            )
        return out

    def _turn_of_values(self) -> tuple[torch.Tensor, float]:
        """The matrix of the values' rotation, and the unit of their levels."""
        return self.values.rotation.matrix(self.query.device, torch.float32), self.values.unit

    def _order_of_values(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The order of channels, and slots, for the last launch by warps; nothing but for two groups."""
        return None, None

    def _groups_of_values(self) -> dict[str, Any]:
        return {"GROUPS": 1, "SHARED": False, "SLOTS": False}

    def _output(self, dense: list[torch.Tensor], out: torch.Tensor | None, into: int | None) -> torch.Tensor:
        """What `merge` writes."""
        if into is not None:
            return dense[0]
        shape = self.batch, self.query_heads, self.queries, self.values.head_dim
        return self._new(*shape, dtype=self.query.dtype) if out is None else out

    def _rows(self) -> launches.Rows:
        shape = self.heads, self.kv_heads, self.rows, self.queries, self.group, self.block, self.blocks
        return launches.Rows(self.query, *shape, self.slots)

    def _division(self) -> dict[str, Any]:
        """How programs are divided among heads."""
        return {
            "STARTS": self.starts is not None,
            "HEADS": self.padded if self.schedule is None else 1,
            "SCHEDULED": self.schedule is not None,
        }

    def _merge_parts(
        self,
        values: PartOperands,
        sums: list[torch.Tensor],
        dense: list[torch.Tensor],
        sinks: torch.Tensor | None,
        out: torch.Tensor | None,
        into: int | None,
    ) -> torch.Tensor:
        """`merge` by the kernel for parts."""
        out = self._output(dense, out, into)
        transform = self.packed.values.transform
        heads = None if self.schedule is None else self.schedule.heads
        launches.merge_parts(
            self._rows(),
            sums,
            dense,
            sinks,
            out,
            into,
            values,
            transform,
            self._is_shared(transform),
            [heads, self.used, self.starts],
            self.pages,
            self._division(),
        )
        return out

    def _merged_by_warps(self) -> bool:
        """Whether the merge needs no matrix, no filters, and no division of programs among heads."""
        hadamard = self.values.rotation.kind == "hadamard"
        return hadamard and not (
            self.plain or self.values.filters or (self.table is not None and self.schedule is None)
        )


class _PartsCall(_Call):
    """A call over codes in parts."""

    def _operands(self) -> Any:
        return tuple(as_parts(_operands(side)) for side in (self.packed.keys, self.packed.values))

    def _prepare(
        self, ends: DenseArguments, constants: dict[str, Any], hidden: int, spare: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        transform = self.packed.keys.transform
        alone = constants | {"HALVES": 1, "FILTERS": (), "ALONE": True}
        sums = self._first_launch(ends, [None] * 7, (1.0, 1.0), alone, hidden, spare)
        shared = self._is_shared(transform)
        return launches.turn_queries(self._rows(), self.keys, transform, shared, self.scale), sums

    def attend(self, prepared: list[torch.Tensor] | Opening) -> list[torch.Tensor]:
        assert not isinstance(prepared, Opening)
        made = None if self.table is None else self.packed.schedule
        self.schedule = made if made is not None and made.programs.shape[0] == self.splits else None
        count = self.heads * self.blocks if self.table is None else self.blocks
        channels = sum(padded_channels(part) for part in self.values.parts)
        sums = self._sums(count, self.splits, channels)
        schedule = None if self.schedule is None else self.schedule.programs
        row = 0 if self.table is None else self.table.stride(1)
        launches.attend_parts(
            self._rows(),
            prepared,
            self.packed,
            (self.keys, self.values),
            [self.used, self.starts, self.table, schedule],
            sums,
            [self.pages, self.heads, self.blocks, row],
            self.softcap,
            {"USED": self.used is not None, "PLAIN": self.plain} | self._division(),
        )
        return sums

    def _programs(self) -> int:
        if self.table is not None:  # a schedule is for these
            return super()._programs()
        own = launches.programs(self.keys, self.values)
        return PLAIN_PROGRAMS if self.plain else own * self._multiprocessors()

    def merge(
        self,
        sums: list[torch.Tensor],
        dense: list[torch.Tensor],
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        into: int | None = None,
    ) -> torch.Tensor:
        return self._merge_parts(self.values, sums, dense, sinks, out, into)


class _GroupsCall(_Call):
    """A call over keys or values in two channel groups, or keys with a sketch, on int8 tensor cores."""

    def _block_rows(self) -> int:
        return ROWS

    def _opens(self) -> bool:
        return True

    def _starts_ahead(self) -> bool:
        return False  # not timed

    def _turned(self) -> list[torch.Tensor | None]:
        if sketch_of(self.keys) is None:
            return super()._turned()
        transform = self.packed.keys.transform
        shared = self._is_shared(transform)
        y, bias = launches.turn_queries(
            self._rows(), with_planes(self.keys, True), transform, shared, self.scale
        )
        return [y, None, None, bias]

    def _signs(self) -> tuple[torch.Tensor | None, float]:
        if sketch_of(self.keys) is not None:
            return None, 1.0
        return signs_of_groups(groups_of(self.keys), self.query.device, keys=True), 1.0

    def _lookup(self) -> torch.Tensor:
        return lookup_of_groups(groups_of(self.keys), groups_of(self.values), self.query.device)

    def _steps(self) -> int:
        return steps_of_groups(self.computed, self.table is not None)

    def _second_parts(self) -> tuple[list[Any], list[Any], torch.Tensor | None, dict[str, Any]]:
        planes, strides = list[Any](), list[Any]()
        kinds: dict[str, Any] = {"SKETCH": sketch_of(self.keys) is not None}
        kinds["K_SIGNS"] = groups_of(self.keys)[0].bits == 1
        sides = ("K2_BITS", self.packed.keys, self.keys), ("V2_BITS", self.packed.values, self.values)
        for name, side, operands in sides:
            part = second_part(operands)
            kinds[name] = 0 if part is None else part.bits
            if part is None:
                planes, strides = [*planes, None, None], [*strides, None, None, None, None]
            else:
                own = side.planes[part.codes].view(torch.int32), side.planes[part.scales]
                planes, strides = [*planes, *own], [*strides, *_strides(own[0]), *_strides(own[1])]
        return planes, strides, contiguous(self.packed.keys.transform.order), kinds

    def _turn_of_values(self) -> tuple[torch.Tensor, float]:
        return signs_of_groups(groups_of(self.values), self.query.device, keys=False), 1.0

    def _order_of_values(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        order = contiguous(self.packed.values.transform.order)
        return order, None if order is None else self.slots

    def _groups_of_values(self) -> dict[str, Any]:
        transform = self.packed.values.transform
        if transform.order is None:
            return super()._groups_of_values()
        return {"GROUPS": 2, "SHARED": self._is_shared(transform), "SLOTS": self.slots is not None}

    def _merged_by_warps(self) -> bool:
        return self.table is None or self.schedule is not None

    def merge(
        self,
        sums: list[torch.Tensor],
        dense: list[torch.Tensor],
        sinks: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        into: int | None = None,
    ) -> torch.Tensor:
        if self._merged_by_warps():
            return super().merge(sums, dense, sinks, out, into)
        values = as_parts(self.values)
        assert values is not None
        return self._merge_parts(with_planes(values, False), sums, dense, sinks, out, into)


def _groups(operands: KernelOperands) -> Any:
    return operands.groups if isinstance(operands, PartOperands) else (operands,)


def _call(query: torch.Tensor, packed: PackedSegment, plain: bool) -> type[_Call]:
    if _readable(packed):
        return _Call
    return _GroupsCall if not plain and readable_groups(query, packed) else _PartsCall


def opens_call(query: torch.Tensor, keys: KernelOperands, values: KernelOperands, rows: int) -> bool:
    """Whether the split kernel prepares its queries itself, and attends the 16-bit tokens.

    A head_dim of 256 leaves no room for it, in registers and in shared memory, and 16 rows would spill more.

    Args:
        query: [BH, rows of a head, D].
        keys: operands of the keys.
        values: operands of the values.
        rows: rows that a program computes.
    """
    if isinstance(keys, PartOperands) or isinstance(values, PartOperands):
        return False
    small = rows <= 8 and max(keys.head_dim, values.head_dim) <= 128
    turned = keys.rotation.kind == "hadamard" and not keys.filters
    return small and turned and query.dtype in (torch.bfloat16, torch.float16)


def pass_bounds(queries: int) -> list[int]:
    """Where passes over query tokens begin and end: as few as there may be, and about equally long."""
    passes = -(-queries // MOST_QUERIES)
    return [queries * number // passes for number in range(passes + 1)]


def block_rows(rows: int, head_dim: int, planes: int = 0) -> int:
    """How many rows share a program, 8 or 16; a head_dim of 256 or four bit planes leave registers for 8."""
    return 8 if rows <= 8 or head_dim > 128 or planes > 3 else 16


def steps_of_page(keys: KernelOperands, values: KernelOperands, rows: int, paged: bool) -> int:
    """Steps in which a page is read: two where a whole page would not fit into registers.

    Args:
        keys: operands of the keys.
        values: operands of the values.
        rows: rows that a program computes.
        paged: whether heads have page tables, which need registers too.
    """
    bits, few = max(keys.bits, values.bits), rows <= FEW_ROWS
    fine = bits == 4 and (keys.fine or values.fine)
    large = fine or bits > 4 or max(keys.head_dim, values.head_dim) > 128 or rows > 8
    planes = most_planes(keys, values)
    many = (bits == 4 and (paged or not few)) or (planes == 3 and not few) or planes > 3
    return 2 if large or many else 1


def stages_words(keys: KernelOperands, values: KernelOperands, steps: int, device: torch.device) -> bool:
    """Whether words of 3 bits, and of bit planes, wait in shared memory until they are read.

    With a head_dim of 256 there are too many for registers, and loading them for both steps of a page takes
    half as long again. Three or four bit planes in two steps need the registers for queries and sums, and
    codes of 8 bits beside them need the registers for words.
    """
    bits = keys.bits, values.bits
    wide = 3 in bits and max(keys.head_dim, values.head_dim) > 128
    beside = 8 in bits and (3 in bits or None in (keys.codebook, values.codebook))
    many = wide or beside or (most_planes(keys, values) > 2 and steps == 2)
    return many and shared_memory(device) >= PROGRAMS * STAGED_BYTES


def most_planes(keys: KernelOperands, values: KernelOperands) -> int:
    """Bit planes of keys or of values, whichever has more; 0: neither has several."""
    return max(len(keys.filters), len(values.filters))


def split_count(pages: int, blocks: int, programs: int) -> int:
    """Number of programs per block of rows, so that all programs together fill the GPU once.

    Args:
        pages: P, the pages of a KV head.
        blocks: B * Hkv * blocks of rows.
        programs: programs that the GPU runs at a time.
    """
    few, many = MOST_SPLITS
    splits = max(1, min(pages, programs // blocks, max(few, min(many, pages // PAGES_OF_SPLIT))))
    return splits if splits < few else splits // MERGED[1] * MERGED[1]


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory per multiprocessor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def _in_rows(table: torch.Tensor) -> torch.Tensor:
    """A page table [B, Hkv, P] whose rows are equally far apart, as those of a slice over P are."""
    even = table.stride(2) == 1 and table.stride(0) == table.shape[1] * table.stride(1)
    return table if even else table.contiguous()


def _strides(plane: torch.Tensor) -> tuple[int, int]:
    """Strides from head to head (0 in a pool [N, ...] of pages) and from page to page."""
    return (plane.stride(1) if plane.dim() == 4 else 0), plane.stride(-2)


def _operands(side: PackedSide) -> KernelOperands:
    operands = side.codec.kernel_operands()
    assert operands is not None  # by `supports`
    return operands
