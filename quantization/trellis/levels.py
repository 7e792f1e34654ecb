"""Writes levels.json, the shipped levels: `python -m quantpress.quantization.trellis.levels`.

Lloyd's iteration: random unit vectors are coded, and each level moves to the mean of the coordinates that it
stands for. It begins from quantiles of the normal distribution in random order, and what it finds depends on
the order; the best of several beginnings goes on with more vectors. The levels are then rounded to whole
numbers of a byte, which 8-bit integer tensor cores multiply without error. Takes some minutes.
"""

from __future__ import annotations

import json
import sys
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from quantpress.quantization.trellis.code import BITS, STATES, Trellis
from quantpress.quantization.trellis.path import nearest_path

HEAD_DIM = 64
LARGEST = 127
BEGINNINGS = 8
STEPS = (30, 40)
"""Iterations of each beginning, and of the best one."""
VECTORS = (1024, 8192)
"""Random vectors of one iteration, in the same order."""


def fitted(levels: Tensor, bits: int, steps: int, vectors: int, seed: int) -> tuple[Tensor, float]:
    """Improve levels by Lloyd's iteration.

    Args:
        levels: [256] float32, for coordinates of unit variance.
        bits: code width.
        steps: number of iterations.
        vectors: number of random vectors of each; each iteration has its own.
        seed: of the random vectors.

    Returns:
        The levels, and the mean squared error of a coordinate over the last fifth of the iterations.
    """
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(steps):
        x = torch.randn(vectors, HEAD_DIM, generator=generator, dtype=torch.float32, device="cpu")
        unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # levels need not be whole numbers here
        trellis = Trellis(bits, tuple(levels.tolist()), 1.0)
        states = trellis.states(nearest_path(unit, trellis)).int().flatten()
        coordinates = unit.flatten() * HEAD_DIM**0.5
        errors.append(float((levels[states] - coordinates).square().mean()))
        sums = torch.zeros_like(levels).index_add_(0, states, coordinates)
        counts = torch.bincount(states, minlength=STATES)
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels)
    last = errors[-max(1, steps // 5) :]
    return levels, sum(last) / len(last)


def beginning(seed: int) -> Tensor:
    """[256] quantiles of the normal distribution in random order."""
    middles = (torch.arange(STATES, dtype=torch.float64, device="cpu") + 0.5) / STATES
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(STATES, generator=generator, dtype=torch.int64, device="cpu")
    quantiles: Tensor = torch.special.ndtri(middles)
    return quantiles[order].float()


def build(bits: int, beginnings: int = BEGINNINGS) -> Trellis:
    """A trellis of a width."""
    first = (fitted(beginning(seed), bits, STEPS[0], VECTORS[0], seed) for seed in count())
    levels = min(islice(first, beginnings), key=lambda found: found[1])[0]
    levels, _ = fitted(levels, bits, STEPS[1], VECTORS[1], beginnings)
    unit = float(levels.abs().max()) / LARGEST
    return Trellis(bits, tuple(int(level) for level in (levels / unit).round()), unit)


def main() -> None:
    """Write levels.json beside this file."""
    path = Path(__file__).with_name("levels.json")
    made = [build(bits) for bits in BITS]
    rows = [f'"{one.bits}": {json.dumps({"unit": one.unit, "scaled": list(one.scaled)})}' for one in made]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    sys.stdout.write(f"{len(rows)} trellises written to {path.name}\n")


if __name__ == "__main__":
    main()
