"""Calls over codes in parts: fractions of bits, sketches, levels that are no bytes."""

from typing import Any

import torch

from quantpress.kernels.attend.calls.call import Call, operands_of, strides_of
from quantpress.kernels.attend.calls.settings import PLAIN_PROGRAMS
from quantpress.kernels.attend.opening.arguments import (
    DenseArguments,
    Opening,
    contiguous,
)
from quantpress.kernels.attend.operands import PartOperands
from quantpress.kernels.attend.parts import launches
from quantpress.kernels.attend.parts.groups import (
    ROWS,
    groups_of,
    lookup_of_groups,
    second_part,
    signs_of_groups,
    sketch_of,
    steps_of_groups,
    with_planes,
)
from quantpress.kernels.attend.parts.operands import as_parts, padded_channels


class PartsCall(Call):
    """A call over codes in parts."""

    def _operands(self) -> Any:
        return tuple(as_parts(operands_of(side)) for side in (self.packed.keys, self.packed.values))

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

    def _values_in_parts(self) -> PartOperands | None:
        found: PartOperands = self.values
        return found


class GroupsCall(Call):
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
                planes, strides = [*planes, *own], [*strides, *strides_of(own[0]), *strides_of(own[1])]
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

    def _values_in_parts(self) -> PartOperands | None:
        values = None if self._merged_by_warps() else as_parts(self.values)
        return None if values is None else with_planes(values, False)
