"""Attention in a decode step at fixed addresses, eager, captured, or under torch.compile.

torch.compile traces such a step as a whole. The layers then return the new keys and values as they are, and
attention becomes the operator `quantpress::step_attention`, which writes them to the layer and attends to all
of its tokens. The compiled code knows only the index of the layer; the cache is the one whose step runs.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from quantpress.cache.attention.by_heads import attend
from quantpress.kernels.attend import Segment, Visibility

stepping = False
"""Whether a step runs in any thread; torch.compile guards on it."""

_running = 0
_counting = threading.Lock()
_local = threading.local()


@contextmanager
def layers_of_a_step(layers: Sequence[Any]) -> Iterator[None]:
    """While inside, `step_attention` of this thread means these layers."""
    _local.layers = layers
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _local.layers = ()


def _count(steps: int) -> None:
    global stepping, _running
    with _counting:
        _running += steps
        stepping = _running > 0


def is_compiled_step() -> bool:
    """Whether torch.compile is tracing a step."""
    return torch.compiler.is_compiling() and stepping


def attend_step(
    query: torch.Tensor,
    segments: Sequence[Segment],
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend with one query to every token of a layer at fixed addresses.

    Args:
        query: [B, Hq, 1, D].
        segments: the whole memory of the layer, with lengths on the device.
        scaling: factor on q.k.
        softcap: as for `quantpress.kernels.attend.attend`.
        sinks: as there.

    Returns:
        [B, 1, Hq, Dv] in the query's dtype.
    """
    limits = Visibility(1, sum(segment.tokens for segment in segments))
    output = attend(query, segments, limits, scaling=scaling, softcap=softcap, sinks=sinks)
    return output.transpose(1, 2).contiguous()


@torch.library.custom_op("quantpress::step_attention", mutates_args=())
def step_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: int,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Append one token to a layer of the cache whose step runs, and attend to all of its tokens.

    Args:
        query: [B, Hq, 1, D].
        keys: [B, Hkv, 1, D].
        values: [B, Hkv, 1, Dv].
        layer: its index in the cache.
        scaling: as for `attend_step`.
        softcap: as there.
        sinks: as there.

    Returns:
        [B, 1, Hq, Dv] in the query's dtype.
    """
    own = _local.layers[layer]
    own.update(keys, values)
    return attend_step(query, own.fixed.step_segments(), scaling, softcap, sinks)


@step_attention.register_fake
def _(query: torch.Tensor, keys: Any, values: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], values.shape[-1])
