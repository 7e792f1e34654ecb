"""Which tokens survived an eviction, found from their keys and values.

kvpress's scorers keep an unsorted top-k per head and do not say which tokens it holds, but a packed layer
keeps its first and its last tokens in 16 bits. Eviction only copies vectors, so a survivor has the same bits
as before: each vector is hashed exactly (integers, no tolerance) and looked up among the originals.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

_WORKSPACE_VALUES = 1 << 22  # int64 numbers per chunk: 32 MB
_HASH_SEED = 20250504
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Survivors:
    """What the evictors have left of one layer.

    Args:
        keys: [B, Hkv, K, D].
        values: [B, Hkv, K, Dv].
        hidden: [B, Hkv, K] bool, tokens that a head does not see; None: it sees all.
        scores: [B, Hkv, K], by which tokens are demoted; None: none is.
    """

    keys: torch.Tensor
    values: torch.Tensor
    hidden: torch.Tensor | None = None
    scores: torch.Tensor | None = None

    def sorted_by(self, positions: torch.Tensor) -> "Survivors":
        """The same tokens with their positions [B, Hkv, K] in ascending order, for each head on its own."""
        order = positions.argsort(dim=-1)
        by_slot = (None if part is None else part.gather(2, order) for part in (self.hidden, self.scores))
        return Survivors(_gathered(self.keys, order), _gathered(self.values, order), *by_slot)


def survivor_positions(
    before_keys: torch.Tensor,
    before_values: torch.Tensor | None,
    after_keys: torch.Tensor,
    after_values: torch.Tensor | None,
) -> torch.Tensor | None:
    """Positions of surviving tokens among the original ones, per head.

    Tokens are looked up by keys and values together. If not all are found, by keys alone (values were
    merged), then by values alone (keys were rotated again, or lost channels).

    Args:
        before_keys: [B, Hkv, N, D] keys of every token, any float dtype.
        before_values: [B, Hkv, N, Dv], or None to look at keys only.
        after_keys: [B, Hkv, K, D] keys of the survivors, same dtype.
        after_values: [B, Hkv, K, Dv], or None to look at keys only.

    Returns:
        [B, Hkv, K] int64, the position of each survivor; None when a survivor is found at no position, at
        two, or at that of another survivor.
    """
    before, after = _row_hashes(before_keys), _row_hashes(after_keys)
    if before_values is None or after_values is None:
        return _find(before, after)
    value_before, value_after = _row_hashes(before_values), _row_hashes(after_values)
    mixer = _multipliers(1, before.device)
    for known, wanted in (
        (before * mixer + value_before, after * mixer + value_after),
        (before, after),
        (value_before, value_after),
    ):
        positions = _find(known, wanted)
        if positions is not None:
            return positions
    return None


def _gathered(part: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Take slots `order` [B, Hkv, K] of [B, Hkv, T, D]."""
    return part.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, part.shape[-1]))


def _find(known: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """Index into `known` [..., N] of each entry of `wanted` [..., K]; None unless it is one to one."""
    if known.shape[:-1] != wanted.shape[:-1] or wanted.shape[-1] > known.shape[-1]:
        return None
    if not wanted.shape[-1]:
        return wanted
    ordered, order = known.sort(dim=-1)
    first = torch.searchsorted(ordered, wanted)
    behind = torch.searchsorted(ordered, wanted, right=True)
    positions = order.gather(-1, first.clamp(max=known.shape[-1] - 1))
    apart = positions.sort(dim=-1).values.diff(dim=-1) > 0
    found_once = (behind - first == 1).all() & apart.all()  # waited for only once
    return positions if bool(found_once) else None


def _row_hashes(x: torch.Tensor) -> torch.Tensor:
    """sum_i m_i * bits(x_i) modulo 2**64, m_i fixed odd numbers: [B, H, N, D] float -> [B, H, N] int64."""
    batch, heads, tokens, dim = x.shape
    multipliers = _multipliers(dim, x.device)
    chunk = max(1, _WORKSPACE_VALUES // max(1, batch * heads * dim))
    hashes = torch.empty(batch, heads, tokens, dtype=torch.int64, device=x.device)
    for start in range(0, tokens, chunk):
        rows = x[:, :, start : start + chunk].contiguous().view(_WORDS[x.element_size()])
        hashes[:, :, start : start + chunk] = (rows.long() * multipliers).sum(-1)
    return hashes


@lru_cache(maxsize=64)
def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_HASH_SEED)
    limits = torch.iinfo(torch.int64)
    numbers = torch.randint(
        limits.min, limits.max, (count,), generator=generator, dtype=torch.int64, device="cpu"
    )
    return (numbers | 1).to(device)
