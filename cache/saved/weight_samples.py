"""A few numbers of each weight of a model, also where several processes have a part of the weights each.

The numbers, and so the fingerprint of a model, are the same for any number of processes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantpress.cache.ranks import Ranks, ranks_of
from quantpress.errors import UnsupportedModelError

SAMPLE = 64
"""Evenly spaced numbers that are taken of each weight."""

_WIDEST = 8  # bytes of a number
_COLUMNS, _ROWS = (-2, -1), (-1, None)  # the dimensions along which a matrix and a vector are split
_WHOLE = (None, None)
_STYLES: dict[str, tuple[tuple[int | None, int | None], int]] = {
    "colwise": (_COLUMNS, 1),
    "colwise_gather_output": (_COLUMNS, 1),
    "packed_colwise": (_COLUMNS, 2),
    "rowwise": (_ROWS, 1),
    "rowwise_split_input": (_ROWS, 1),
    "packed_rowwise": (_ROWS, 2),
    "embedding_rowwise": ((0, None), 1),
    "sequence_parallel": (_WHOLE, 1),
    "moe_tp_experts": (_WHOLE, 1),
}
"""How each style of transformers' plans splits weights: dimensions, and parts that are split one by one."""

Sample = tuple[tuple[int, ...], Tensor]


def samples(model: nn.Module, weights: Sequence[tuple[str, Tensor]]) -> list[Sample]:
    """The shape of each whole weight, and `SAMPLE` numbers of it as bytes on the CPU.

    Args:
        model: the model.
        weights: plain tensors by their names in the model; those of this process where the model is split.

    Raises:
        UnsupportedModelError: it is not known how the model's plan splits a weight.
    """
    ranks = ranks_of(model)
    if ranks is None:
        return [(tuple(one.shape), _bytes(_evenly(one.detach().reshape(-1)))) for _, one in weights]
    dims = [_split(model, name, one) for name, one in weights]
    sizes = [0 if dim is None else one.shape[dim] for (dim, _), (_, one) in zip(dims, weights, strict=True)]
    totals = [sum(of_ranks) for of_ranks in zip(*ranks.each(sizes), strict=True)]
    shares = [
        _Share(one, dim, total, parts)
        for (dim, parts), (_, one), total in zip(dims, weights, totals, strict=True)
    ]
    own = torch.stack([share.sample(ranks) for share in shares])
    whole = ranks.gathered(own[None], 0).sum(0, dtype=torch.uint8).cpu()
    return [
        (share.shape, one[: share.count, : share.weight.itemsize].flatten())
        for share, one in zip(shares, whole, strict=True)
    ]


@dataclass(frozen=True)
class _Share:
    """One process's part of a weight that has `total` entries along `dim`; None: the whole weight."""

    weight: Tensor
    dim: int | None
    total: int
    parts: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.weight.shape)
        if self.dim is not None:
            shape[self.dim] = self.total
        return tuple(shape)

    @property
    def count(self) -> int:
        return min(SAMPLE, torch.Size(self.shape).numel())

    def sample(self, ranks: Ranks) -> Tensor:
        """[SAMPLE, 8] uint8, the bytes of the numbers that this process has; 0 for those of the others."""
        found = torch.zeros(SAMPLE, _WIDEST, dtype=torch.uint8, device=self.weight.device)
        numel = torch.Size(self.shape).numel()
        indices = torch.arange(0, numel, max(1, numel // SAMPLE), device="cpu")[:SAMPLE]
        places = list(torch.unravel_index(indices, self.shape))
        mine = torch.full(indices.shape, ranks.first, dtype=torch.bool, device="cpu")
        if self.dim is not None:
            per_part, held = self.total // self.parts, self.weight.shape[self.dim] // self.parts
            part, within = places[self.dim] // per_part, places[self.dim] % per_part
            within = within - ranks.index * -(-per_part // ranks.count)
            mine = (within >= 0) & (within < held)
            places[self.dim] = part * held + within
        numbers = self.weight.detach()[tuple(one[mine].to(found.device) for one in places)]
        found[: len(indices)][mine.to(found.device), : numbers.itemsize] = (
            numbers.contiguous().view(torch.uint8).view(-1, numbers.itemsize)
        )
        return found


def _split(model: nn.Module, name: str, weight: Tensor) -> tuple[int | None, int]:
    """The dimension along which a weight is split, and the number of parts that are split one by one."""
    plan = getattr(model, "tp_plan", None) or {}
    general = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    style = plan.get(general) or plan.get(general.rpartition(".")[0])
    if style is None:
        return None, 1
    if style not in _STYLES:
        raise UnsupportedModelError(
            f"{name} is split over processes as {style!r}, which is not known here: the model cannot be told "
            "from others; read, save and load contexts in one process"
        )
    (matrix, vector), parts = _STYLES[style]
    return (vector if weight.dim() == 1 else matrix), parts


def _evenly(flat: Tensor) -> Tensor:
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.cpu().contiguous().view(torch.uint8)
