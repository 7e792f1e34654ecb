"""The nearest level of each coordinate, faster than by binary search and with exactly the same result.

A uniform grid is laid over the thresholds, so fine that a cell contains at most one of them. The cell of a
coordinate says how many thresholds lie below the cell, and one comparison with the next threshold gives the
code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.kept import kept
from quantpress.quantization.codebook import Codebook

CELLS_PER_GAP = 4  # leaves a cell on both sides for float32 rounding


@dataclass(frozen=True, eq=False)
class NearestLevel:
    """Rounds coordinates to the levels of a codebook.

    Args:
        levels: [2**bits] float32, ascending.
        thresholds: [2**bits] float32: the thresholds between the levels, then infinity.
        first: [cells] int32, how many thresholds lie below each cell for certain.
        origin: lower edge of the first cell.
        pitch: cells per unit of the coordinate.
    """

    levels: Tensor
    thresholds: Tensor
    first: Tensor
    origin: float
    pitch: float

    def __call__(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Round coordinates.

        Args:
            unit: [...] float32, finite.

        Returns:
            The codes [...] uint8, which are the numbers of thresholds below the coordinates, and their levels
            [...] float32.
        """
        cell = unit.sub(self.origin).mul_(self.pitch).clamp_(0, len(self.first) - 1).int()
        code = self.first.index_select(0, cell.reshape(-1)).reshape(cell.shape)
        code += unit > self.thresholds.index_select(0, code.reshape(-1)).reshape(unit.shape)
        return code.to(torch.uint8), self.levels.index_select(0, code.reshape(-1)).reshape(unit.shape)


@kept
def nearest_level(book: Codebook, device: torch.device) -> NearestLevel:
    """The `NearestLevel` of a codebook on a device; cached."""
    thresholds = book.threshold_tensor("cpu")
    gap = float(thresholds.double().diff().min()) if len(thresholds) > 1 else 1.0
    width = gap / CELLS_PER_GAP
    origin = float(thresholds[0]) - 2 * width
    cells = int((float(thresholds[-1]) - origin) / width) + 3
    starts = origin + width * torch.arange(cells, dtype=torch.float64, device="cpu")
    first = torch.searchsorted(thresholds.double(), starts - width, out_int32=True)
    endless = torch.cat((thresholds, thresholds.new_tensor([float("inf")])))
    levels = book.level_tensor(device)
    return NearestLevel(levels, endless.to(device), first.to(device), origin, 1 / width)
