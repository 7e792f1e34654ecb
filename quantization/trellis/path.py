"""The codes whose levels are nearest to a vector: Viterbi's algorithm, in plain PyTorch.

For each channel and state, the least error of any codes that end in this state is known from the 2**b states
that can come before it. Going back from the end gives the codes. A tail-biting path must end where it began,
and trying all beginnings would take as many searches as there are states. Two come close (QTIP, arXiv
2406.11235): one over the channels around the vector's beginning, free at both ends, says in which state the
vector should begin; the other is the nearest path from this state back to it.
"""

import torch
from torch import Tensor

from quantpress.quantization.trellis.code import Trellis

JOIN = {1: 64, 2: 32, 3: 24, 4: 24}
"""By width, channels on each side of a vector's beginning over which the first search goes; at most half.

At D = 128 the squared error of 2 and 3 bits is 0.1 to 0.2 % more than with all channels; that of 1 bit would
be 0.8 % more with 32."""
VECTORS = {"cpu": 512}
"""Vectors searched at a time, so that their errors stay in a core's cache."""
MANY_VECTORS = 1 << 15
"""The same on other devices: some 400 MB of workspace at D = 128 and 2 bits."""


@torch.no_grad()
def nearest_path(unit: Tensor, trellis: Trellis) -> Tensor:
    """Codes of the tail-biting path that is nearest, or nearly so, to each vector.

    Args:
        unit: [N, D] float32, unit vectors; D is at least 8.
        trellis: the trellis.

    Returns:
        [N, D] uint8, each below 2**bits.
    """
    x = unit * unit.shape[-1] ** 0.5
    levels = trellis.level_tensor(1, x.device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    chunk = VECTORS.get(x.device.type, MANY_VECTORS)
    for part, out in zip(x.split(chunk), codes.split(chunk), strict=True):
        coordinates = part.t().contiguous()  # [D, n]
        near = min(JOIN[trellis.bits], len(coordinates) // 2)
        around = coordinates.roll(near, 0)[: 2 * near]
        begin = searched(around, levels, trellis.bits)[near - 1].long()  # the state behind the last channel
        out.copy_(searched(coordinates, levels, trellis.bits, begin).t() & (1 << trellis.bits) - 1)
    return codes


def searched(x: Tensor, levels: Tensor, bits: int, ends: Tensor | None = None) -> Tensor:
    """Search for the path that is nearest to each column.

    Args:
        x: [D, n] float32.
        levels: [2**w] float32, of each state.
        bits: code width b.
        ends: [n] int64, the state before the first channel and at the last one; None: any.

    Returns:
        The states of the path, [D, n] uint8, or int16 where w is more than 8.
    """
    count = len(levels)
    groups, vectors = count >> bits, x.shape[1]  # states that differ in their last code have one past
    of_code = levels.view(groups, 1 << bits, 1)
    errors = x.new_zeros(count, vectors)
    if ends is not None:
        errors.fill_(torch.inf).scatter_(0, ends[None], 0.0)
    before = torch.empty(len(x), groups, vectors, dtype=torch.uint8, device=x.device)
    for channel, past in zip(x, before, strict=True):
        least = _least(errors.view(1 << bits, groups, vectors), past)
        errors = (channel - of_code).square_().add_(least.unsqueeze(1)).view(count, vectors)
    state = errors.argmin(0) if ends is None else ends
    states = torch.empty(x.shape, dtype=torch.uint8 if count <= 256 else torch.int16, device=x.device)
    for at in range(len(x) - 1, -1, -1):
        states[at] = state
        group = state >> bits
        state = before[at].gather(0, group[None])[0].long() * groups | group
    return states


def _least(errors: Tensor, which: Tensor) -> Tensor:
    """The least of [K, G, n] over K; its index is written to `which` [G, n] uint8."""
    least: list[Tensor] = list(errors)
    index = list(torch.arange(len(least), dtype=torch.uint8, device=errors.device))
    while len(least) > 1:
        pairs = list(zip(least[::2], least[1::2], strict=True))
        later = [b < a for a, b in pairs]
        least = [torch.minimum(a, b) for a, b in pairs]
        index = [torch.where(x, b, a) for x, a, b in zip(later, index[::2], index[1::2], strict=True)]
    which.copy_(index[0])
    return least[0]
