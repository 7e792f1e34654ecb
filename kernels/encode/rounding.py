"""How the Hopper encode kernel rounds coordinates at 3 and 4 bits: four at a time, in the bytes of a word.

Levels of an "int8" codebook are odd multiples of a unit, so thresholds are whole multiples n of it. A byte
holds n + offset, at most 255, and its upper three bits name one of eight cells of 32. Each cell holds at most
one threshold, and what is added in a cell makes its upper three bits the field.
"""

from dataclasses import dataclass
from functools import lru_cache

from quantpress.quantization.codebook import Codebook

CELL = 32
"""Bytes of one cell: the upper three bits of a byte name it."""


@dataclass(frozen=True)
class ByteRounding:
    """The field of n units, n rounded down: (m + added[m // CELL]) // CELL with m = min(n + offset, 255).

    Args:
        offset: with it no cell holds two thresholds.
        added: for each cell; no sum is above 255.
    """

    offset: int
    added: tuple[int, ...]


@lru_cache(maxsize=64)
def byte_rounding(book: Codebook) -> ByteRounding:
    """The rounding of magnitudes, with the least offset that there is.

    Args:
        book: an int8 codebook for head_dim 128, of 3 bits, whose fields are the codes of positive numbers, or
            of 4 bits, whose fields are magnitudes.
    """
    thresholds = [round(t / book.unit) for t in book.thresholds[len(book.levels) // 2 :]]
    least = 4 if book.bits == 3 else 0
    for offset in range(CELL):
        added = [_added(cell, thresholds, offset, least) for cell in range(256 // CELL)]
        if None not in added:
            return ByteRounding(offset, tuple(one for one in added if one is not None))
    raise ValueError(f"two thresholds of {book.bits} bits are always in one cell")


def _added(cell: int, thresholds: list[int], offset: int, least: int) -> int | None:
    """What is added in a cell, or None."""
    inside = range(cell * CELL, (cell + 1) * CELL)
    fields = [least + sum(m >= t + offset for t in thresholds) for m in inside]
    for added in range(256 - inside[-1]):
        if all((m + added) // CELL == field for m, field in zip(inside, fields, strict=True)):
            return added
    return None
