"""Parts of a cache whose heads lie on several processes: put together to be saved, and divided when loaded.

Files hold all heads, so that they can be loaded by any number of processes that divides the KV heads.
"""

from collections.abc import Callable
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from quantpress.cache.ranks import Ranks
from quantpress.codecs.parts import Parts
from quantpress.errors import InvalidInputError

Indices: TypeAlias = tuple[Tensor, ...]

_HEADS = 1  # the dimension of heads in every tensor of `_BY_HEAD`
_BY_HEAD = (
    "cache",
    "coarse_pages",
    "dynamic_layer",
    "even_pages",
    "head_counts",
    "packed_layer",
    "packed_tokens",
    "pages",
    "sliding_window_layer",
    "transform",
)
"""Kinds of parts whose tensors have a dimension of heads."""

_RAGGED = "ragged_pages"
_SAVED_ALONE = "read, save and load it in one process"


def all_heads(parts: Parts, ranks: Ranks) -> Parts:
    """The parts of a cache with the heads of all processes; every process calls this.

    Args:
        parts: those of this process.
        ranks: the processes.

    Returns:
        The parts to save, with tensors on the CPU. In other processes than the first, tensors are empty.

    Raises:
        InvalidInputError: heads keep different numbers of tokens, or a layer keeps more than tokens.
    """
    _check(parts)
    if any("head_counts" in kinds for kinds in ranks.each(_kinds(parts))):
        raise InvalidInputError(
            "heads of this context keep different numbers of tokens, as under AdaKV, and those of several "
            "processes cannot be put together; read and save it in one process, load it in several"
        )
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _changed(parts, note)
    shapes = ranks.each([tuple(one.shape) for one in tensors])
    if any(other != shapes[0] for other in shapes):
        raise InvalidInputError(
            f"the processes keep different numbers of tokens, which cannot be put together; {_SAVED_ALONE}"
        )
    dtypes = ranks.each([one.dtype for one in tensors])
    widest = (reduce(torch.promote_types, of_one) for of_one in zip(*dtypes, strict=True))  # of scales

    def gather(tensor: Tensor) -> Tensor:
        whole = ranks.gathered(tensor.to(next(widest)), _HEADS)
        return whole.cpu() if ranks.first else whole.new_empty(0)

    return _changed(parts, gather)


def own_heads(parts: Parts, ranks: Ranks) -> Parts:
    """The parts of a cache with the heads of this process.

    Args:
        parts: those of all heads. Tensors are not copied.
        ranks: the processes; their number divides the number of heads.

    Raises:
        InvalidInputError: a layer keeps more than tokens.
    """
    _check(parts)

    def narrowed(tensor: Tensor) -> Tensor:
        heads = tensor.shape[_HEADS] // ranks.count
        return tensor.narrow(_HEADS, ranks.index * heads, heads)

    return _changed(parts, narrowed)


def _changed(parts: Parts, change: Callable[[Tensor], Tensor]) -> Parts:
    """With `change` applied to the tensors that have heads; codecs are the same for all heads."""
    if parts.kind == _RAGGED:
        return _ragged(parts, change)
    if parts.kind not in _BY_HEAD:
        return parts
    tensors = {name: change(one) for name, one in parts.tensors.items()}
    inner = {name: _changed(one, change) for name, one in parts.inner.items()}
    return Parts(parts.kind, parts.about, tensors, inner)


def _ragged(parts: Parts, change: Callable[[Tensor], Tensor]) -> Parts:
    """Pages of the heads that `change` leaves in the page table; others are left out of the pool."""
    table = change(parts.tensors["table"])
    used, rows = table.unique(return_inverse=True)
    pools = {
        side: Parts(
            pool.kind, pool.about, {name: one[:, :, used.long()] for name, one in pool.tensors.items()}
        )
        for side, pool in parts.inner.items()
    }
    return Parts(parts.kind, parts.about, {"table": rows.view(table.shape).to(table.dtype)}, pools)


def all_slots(indices: Indices, heads: int, ranks: Ranks) -> Indices:
    """Indices (batch, head, slot) in the heads of every process, from those in the `heads` of this one."""
    batch, head, slot = (one.cpu() for one in indices)
    each = ranks.each((batch, head + ranks.index * heads, slot))
    return tuple(torch.cat(of_one) for of_one in zip(*each, strict=True))


def own_slots(indices: Indices, heads: int, index: int) -> Indices:
    """Of indices (batch, head, slot) in all heads, those in the `heads` of the process `index`."""
    batch, head, slot = (one.cpu() for one in indices)
    own = head // heads == index
    return batch[own], head[own] - index * heads, slot[own]


def _check(parts: Parts) -> None:
    if "head_groups" in _kinds(parts):
        raise InvalidInputError(
            f"heads of this context have widths of their own, which cannot be divided among processes; "
            f"{_SAVED_ALONE}, or use a plan by layer (`quantpress fit --by layer`)"
        )
    unknown = sorted(
        {one.kind for one in parts.inner.values()} - {"packed_layer", "dynamic_layer", "sliding_window_layer"}
    )
    if unknown:
        raise InvalidInputError(
            f"layers of kind {', '.join(unknown)} cannot be divided among processes; {_SAVED_ALONE}"
        )


def _kinds(parts: Parts) -> set[str]:
    return {parts.kind}.union(*map(_kinds, parts.inner.values()))
