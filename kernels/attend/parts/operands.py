"""Which codes are read in parts, and the matrices and levels that the kernels read them with."""

import torch

from quantpress.kept import kept
from quantpress.kernels.attend.operands import CodePart, KernelOperands, PartOperands

LEAST_CHANNELS = 32
"""Channels of a part are padded to a power of two of at least so many."""

MOST_LEVELS = 512
"""Of a part."""

MOST_REACH = 8
"""Channels whose codes choose a level."""

_FACTORS = 1 << 13
"""Factors that are tried, from 1 to 2."""


@kept
def as_parts(operands: KernelOperands) -> PartOperands | None:
    """Codes of any width and levels as one part, filtered planes too; None for what the kernel does not read.

    That is pages that hold keys, and filters with too many taps, or not as many for each plane.
    """
    if isinstance(operands, PartOperands):
        return operands
    filters = operands.filters
    uneven = len({len(lags) for lags in filters}) > 1
    reach = len(filters[0]) if filters else 0
    if operands.page_keys or uneven or reach > MOST_REACH or 1 << operands.bits * reach > MOST_LEVELS:
        return None
    levels = _sums(sum(filters, ())) if filters else operands.levels
    part = CodePart("codes0", "scale0", operands.bits, operands.head_dim, levels, reach)
    return PartOperands((part,), operands.rotation.matrix() * operands.unit)


def _sums(taps: tuple[float, ...]) -> tuple[float, ...]:
    """Sums of taps for every choice of their signs: plus tap i where bit i of the sum's number is 1."""
    bit = torch.arange(1 << len(taps), device="cpu")[:, None] >> torch.arange(len(taps), device="cpu") & 1
    signed = (2 * bit - 1) * torch.tensor(taps, dtype=torch.float64, device="cpu")
    return tuple(signed.sum(1).tolist())


def padded_channels(part: CodePart | None) -> int:
    """Channels of a part as the kernels have them; 0 where there is none."""
    return 0 if part is None else max(LEAST_CHANNELS, 1 << (part.channels - 1).bit_length())


@kept
def half_levels(levels: tuple[float, ...]) -> tuple[torch.Tensor, float]:
    """[2**b] float16 levels, and the factor that makes the given ones of them.

    Odd whole numbers are exact. Others are multiplied first by what float16 rounds them least with: a table
    of 16 levels then loses a tenth of what it would, one of 256 half.
    """
    exact = torch.tensor(levels, dtype=torch.float64, device="cpu")
    tried = torch.logspace(0, 1, _FACTORS, base=2, dtype=torch.float64, device="cpu")
    found = exact * tried[:, None]
    lost = ((found.half().double() - found) / tried[:, None]).abs().amax(1)
    best = int(lost.argmin())
    return found[best].half(), float(1 / tried[best])


@kept
def turn_matrix(operands: PartOperands, device: torch.device) -> torch.Tensor:
    """[E, D] float32: the rows of `turn`, and rows of zeros behind each part's, up to its padding.

    Each has the factor of `half_levels`.
    """
    rows, at = [], 0
    for part in operands.parts:
        own = (operands.turn[at : at + part.channels] * half_levels(part.levels)[1]).float()
        rows.append(torch.nn.functional.pad(own, (0, 0, 0, padded_channels(part) - part.channels)))
        at += part.channels
    return torch.cat(rows).to(device)


@kept
def level_rows(
    keys: PartOperands, values: PartOperands, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The levels of two parts of keys and of two parts of values, of `half_levels`.

    Returns:
        [4, `MOST_LEVELS`] float16, all levels, the last one first where a part has a reach: a stored bit is 1
        where that of the code is 0; and [4, 4] int32, the registers of `parts.levels` for up to 4 bits: the
        low bytes of eight levels, or of as many positive ones where there are 2 or 16 levels, and their high
        bytes.
    """
    rows = torch.zeros(4, MOST_LEVELS, dtype=torch.float16, device="cpu")
    tables = torch.zeros(4, 4, dtype=torch.int32, device="cpu")
    for side, operands in enumerate((keys, values)):
        for number, part in enumerate(operands.parts, 2 * side):
            levels = half_levels(part.levels)[0]
            rows[number, : len(levels)] = levels.flip(0) if part.reach else levels
            if part.bits <= 4 and not part.reach:
                held = torch.zeros(8, dtype=torch.float16, device="cpu")
                own = levels[len(levels) // 2 :] if part.bits in (1, 4) else levels
                held[: len(own)] = own
                tables[number] = held.view(torch.uint8).view(8, 2).T.contiguous().view(torch.int32).view(4)
    return rows.to(device), tables.to(device)
