"""Writes levels.json, the shipped levels: `python -m quantpress.quantization.trellis.levels`.

Lloyd's iteration: random unit vectors are coded, and the levels move to where they are nearest to the
coordinates that they stand for. Free levels move to the means of these, and taps are found by least squares.
What is found depends on the beginning, so there are many, and the best go on with more vectors. Takes some
minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from quantpress.quantization.trellis.code import BITS, Trellis
from quantpress.quantization.trellis.path import nearest_path

HEAD_DIM = 64
FREE_BITS = (1,)
"""Widths at which levels that are linear in the bits of codes are hardly better than scalar codes."""
WINDOWS = {1: 8, 2: 8, 3: 9, 4: 8}
"""Bits of a state at each width. 9 bits at 3 are three whole codes, with 4 % less squared error than 8."""
STAGES = ((192, 6, 128), (32, 12, 512), (6, 16, 2048), (1, 12, 8192))
"""Of each stage: trellises that are improved, iterations, and random vectors of an iteration."""
DIGITS = 5
"""Decimals of the numbers that are written."""


def fitted(trellis: Trellis, steps: int, vectors: int, seed: int) -> tuple[Trellis, float]:
    """Improve levels by Lloyd's iteration.

    Args:
        trellis: where to begin.
        steps: number of iterations.
        vectors: number of random vectors of each; each iteration has its own.
        seed: of the random vectors.

    Returns:
        The trellis, and the mean squared error of a coordinate over the last fifth of the iterations.
    """
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for _ in range(steps):
        x = torch.randn(vectors, HEAD_DIM, generator=generator, dtype=torch.float32, device="cpu")
        unit = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        states = trellis.states(nearest_path(unit, trellis)).int().flatten()
        coordinates = unit.flatten().double() * HEAD_DIM**0.5
        levels = torch.tensor(trellis.levels, dtype=torch.float64, device="cpu")
        errors.append(float((levels[states] - coordinates).square().mean()))
        trellis = _moved(trellis, levels, states, coordinates)
    last = errors[-max(1, steps // 5) :]
    return trellis, sum(last) / len(last)


def _moved(trellis: Trellis, levels: Tensor, states: Tensor, coordinates: Tensor) -> Trellis:
    """The trellis of least squared error for coordinates in these states."""
    sums = torch.zeros_like(levels).index_add_(0, states, coordinates)
    counts = torch.bincount(states, minlength=len(levels))
    if trellis.taps is None:
        means = torch.where(counts > 0, sums / counts.clamp(min=1), levels)
        return Trellis(trellis.bits, tuple(means.tolist()))
    state = torch.arange(len(levels), dtype=torch.int64, device="cpu").unsqueeze(-1)
    bit = state >> torch.arange(trellis.state_bits, dtype=torch.int64, device="cpu") & 1
    signs = 2.0 * bit.double() - 1.0  # [2**w, w]
    normal = signs.t() @ (counts.unsqueeze(-1) * signs)
    taps = torch.linalg.lstsq(normal, (signs.t() @ sums).unsqueeze(-1)).solution
    return Trellis.linear(trellis.bits, taps.flatten().tolist())


def beginning(bits: int, seed: int) -> Trellis:
    """A trellis of unit variance: free levels are quantiles of the normal distribution in random order."""
    generator = torch.Generator().manual_seed(seed)
    if bits not in FREE_BITS:
        taps = torch.randn(WINDOWS[bits], generator=generator, dtype=torch.float64, device="cpu")
        return Trellis.linear(bits, (taps / torch.linalg.vector_norm(taps)).tolist())
    states = 1 << WINDOWS[bits]
    middles = (torch.arange(states, dtype=torch.float64, device="cpu") + 0.5) / states
    order = torch.randperm(states, generator=generator, dtype=torch.int64, device="cpu")
    quantiles: Tensor = torch.special.ndtri(middles)
    return Trellis(bits, tuple(quantiles[order].tolist()))


def build(bits: int) -> Trellis:
    """A trellis of a width, by the stages."""
    found = [beginning(bits, seed) for seed in range(STAGES[0][0])]
    seed = 0
    for count, steps, vectors in STAGES:
        improved = [fitted(one, steps, vectors, seed + i) for i, one in enumerate(found[:count])]
        found = [one for one, _ in sorted(improved, key=lambda pair: pair[1])]
        seed += count
    return found[0]


def main() -> None:
    """Write levels.json beside this file."""
    path = Path(__file__).with_name("levels.json")
    rows = []
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for made in pool.map(build, BITS):
            name, numbers = ("levels", made.levels) if made.taps is None else ("taps", made.taps)
            rows.append(f'"{made.bits}": {json.dumps({name: [round(number, DIGITS) for number in numbers]})}')
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    sys.stdout.write(f"{len(rows)} trellises written to {path.name}\n")


if __name__ == "__main__":
    main()
