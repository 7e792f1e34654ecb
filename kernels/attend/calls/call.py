"""A call of the attention kernels over one packed segment: its shapes, its buffers and its launches."""

from functools import cached_property
from typing import Any

import torch

from quantpress.kernels.attend.calls.settings import (
    AHEAD_BITS,
    DENSE_TILE,
    FEW_ROWS,
    PAGES_OF_SCORES,
    PLAIN_PROGRAMS,
    block_rows,
    most_planes,
    numbers_in_lanes,
    opens_call,
    split_count,
    stages_words,
    steps_of_page,
    whole_tile,
)
from quantpress.kernels.attend.merge.settings import (
    rows_of_merge,
    sums_by_matrix,
    warps_by_matrix,
    warps_of_merge,
)
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
    SignOperands,
)
from quantpress.kernels.attend.parts import launches
from quantpress.kernels.attend.schedule import (
    PROGRAMS,
    PageSchedule,
    programs_at_a_time,
    scheduled_programs,
)
from quantpress.kernels.available import FUSED, chains
from quantpress.kernels.quick import quick
from quantpress.kernels.rotation_matrix import padded, rotation_matrix
from quantpress.quantization.transform import ChannelTransform


class Call:
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
        return operands_of(self.packed.keys), operands_of(self.packed.values)

    def _block_rows(self) -> int:
        head_dim = max(self.keys.head_dim, self.values.head_dim)
        return block_rows(self.rows, head_dim, most_planes(self.keys, self.values))

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
        sums = self._sums(count, parts + spare, padded(self.values.head_dim))
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
        q = self._new(count, planes, 2 * self.block, padded(self.keys.head_dim), dtype=torch.int8)
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
        sums = self._sums(count, sum(tiles) + spare, padded(value_dim))
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
            *strides_of(means),
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
        sums = self._sums(grid[1], grid[0], padded(value_dim) * max(len(self.values.filters), 1))
        if not self.plain:
            codes = [plane.view(torch.int32) for plane in codes]
        planes = [codes[0], scales[0], codes[1], scales[1]]
        strides = [stride for plane in planes for stride in strides_of(plane)]
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
                IN_LANES=self._in_lanes(),
                num_warps=1,
                maxnreg=255,  # left out, the assembler saves registers for more programs than run at a time
                **self.options,
            )
        return sums

    def _lookup(self) -> torch.Tensor:
        from quantpress.kernels.attend.lookup import lookup_table

        return lookup_table(self.keys.codebook, self.values.codebook, self.query.device)

    def _in_lanes(self) -> int:
        if self.table is not None:  # not timed; most of these numbers are read there
            return 0
        return numbers_in_lanes(self.keys, self.values, self.computed, self.query.device)

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
        in_parts = self._values_in_parts()
        if in_parts is not None:
            return self._merge_parts(in_parts, sums, dense, sinks, out, into)
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
            planes = len(self.values.filters)
            quick(merge_kernel)[(-(-self.rows // each), self.heads)](
                *arguments,
                self.used,
                self.starts,
                self.heads,
                self.pages,
                PLANES=planes,
                FILTERS=sum(self.values.filters, ()),
                SIZE=sums_by_matrix(-(-splits // self.scheduled_heads), value_dim, planes),
                HEADS=self.padded if self.schedule is None else 1,
                STARTS=self.starts is not None,
                EACH=each,
                num_warps=warps_by_matrix(value_dim, planes),
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

    def _values_in_parts(self) -> PartOperands | None:
        """What the merge for parts turns back with; None: another merge does it."""
        return None

    def _merged_by_warps(self) -> bool:
        """Whether the merge needs no matrix, no filters, and no division of programs among heads."""
        hadamard = self.values.rotation.kind == "hadamard" and whole_tile(self.values.head_dim)
        return hadamard and not (
            self.plain or self.values.filters or (self.table is not None and self.schedule is None)
        )


def _in_rows(table: torch.Tensor) -> torch.Tensor:
    """A page table [B, Hkv, P] whose rows are equally far apart, as those of a slice over P are."""
    even = table.stride(2) == 1 and table.stride(0) == table.shape[1] * table.stride(1)
    return table if even else table.contiguous()


def _groups(operands: KernelOperands) -> Any:
    return operands.groups if isinstance(operands, PartOperands) else (operands,)


def strides_of(plane: torch.Tensor) -> tuple[int, int]:
    """Strides from head to head (0 in a pool [N, ...] of pages) and from page to page."""
    return (plane.stride(1) if plane.dim() == 4 else 0), plane.stride(-2)


def operands_of(side: PackedSide) -> KernelOperands:
    """Those of a codec that kernels read, as `supports` has found out."""
    operands = side.codec.kernel_operands()
    assert operands is not None
    return operands
