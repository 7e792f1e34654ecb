"""Processes that share one model by transformers' tensor parallelism (`tp_plan="auto"` under torchrun).

Each process, or rank, has a part of the weights and, in most models, of the attention heads. All of them run
the same program. What only one of them knows is exchanged here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantpress.errors import QuantPressError

_SPLIT = "colwise"
_KEYS = ("k_proj", "query_key_value")
_QUERIES = ("q_proj", "query_key_value")
"""Names of the projections that make keys and queries of single heads, where a rank may have some of them."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share a model, as one of them sees them.

    Args:
        count: how many there are.
        index: which one this is, from 0.
        group: their process group in `torch.distributed`.
        split_heads: whether each has some of the KV heads. False: each has all of them, as with some plans.
    """

    count: int
    index: int
    group: Any
    split_heads: bool

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.index == 0

    @property
    def backend(self) -> str:
        """What they talk by: "nccl", "gloo", ..."""
        return str(dist.get_backend(self.group))

    def gathered(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks, of one shape and any dtype, put together along `dim`."""
        flat = tensor.contiguous().flatten().view(torch.uint8)  # NCCL does not know every dtype
        every = [torch.empty_like(flat) for _ in range(self.count)]
        dist.all_gather(every, flat, group=self.group)
        return torch.cat([one.view(tensor.dtype).view(tensor.shape) for one in every], dim)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises inside, every rank raises when the block ends: nobody waits for it in vain.

        Nothing may be exchanged inside.
        """
        own: QuantPressError | None = None
        try:
            yield
        except QuantPressError as error:
            own = error
        for index, raised in enumerate(self.each(None if own is None else (type(own), str(own)))):
            if raised is not None:
                kind, message = raised
                raise own or kind(f"{message} (said by process {index} of {self.count})")

    def each(self, value: Any) -> list[Any]:
        """What each rank gives, in their order: plain values."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values


def ranks_of(model: nn.Module) -> Ranks | None:
    """The processes that share a model; None if this one has it for itself."""
    count, mesh = getattr(model, "_tp_size", None), getattr(model, "_device_mesh", None)
    if mesh is None or count is None or count == 1:
        return None
    if getattr(mesh, "ndim", 1) > 1:
        mesh = mesh["tp"]
    return Ranks(count, mesh.get_local_rank(), mesh.get_group(), any(map(splits_keys, model.modules())))


def kv_heads(model: nn.Module) -> int:
    """The number of KV heads of a model, on all ranks together."""
    whole: Any = model.config
    config = whole.get_text_config(decoder=True)
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def splits_keys(module: nn.Module) -> bool:
    """Whether an attention module has the KV heads of this rank only. Some plans leave all heads to each."""
    return _is_split(module, _KEYS)


def splits_queries(module: nn.Module) -> bool:
    """Whether an attention module has the query heads of this rank only."""
    return _is_split(module, _QUERIES)


def _is_split(module: nn.Module, names: tuple[str, ...]) -> bool:
    parts = (getattr(module, name, None) for name in names)
    return any(getattr(part, "_hf_tp_plan", None) == _SPLIT for part in parts)
