"""Trellis codes: b bits a coordinate, and levels that depend on the codes before it as well.

code.py      `Trellis`: which level a code stands for
path.py      the codes nearest to a vector, by Viterbi's algorithm
levels.py    writes levels.json, the levels of the shipped trellises

A scalar code has 2**b levels. Here a coordinate has 256, and the last 8 bits of codes up to it choose one; at
3 bits it has 512, which the last 9 bits choose from.
Of the 2**b levels that the next code can choose from, the last ones decide, so a search over whole vectors
finds codes with less error at the same number of bits.
"""

from quantpress.quantization.trellis.code import Trellis, trellis
from quantpress.quantization.trellis.path import nearest_path

__all__ = ["Trellis", "nearest_path", "trellis"]
