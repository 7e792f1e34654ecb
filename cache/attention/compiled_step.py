"""The packed part of a decode step as one operator, so that torch.compile can trace the rest as a whole.

Under torch.compile, a layer whose step it is hands the new keys and values on as they are, and attention
becomes `quantpress::step_attention`, which writes them to the layer and attends all of it. The compiled code
holds the number of the layer only: the cache is whichever is in a step when the code runs.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

stepping = False
"""Whether a step is running, in any thread; torch.compile guards on it."""

_running = 0
_counting = threading.Lock()
_local = threading.local()


@contextmanager
def layers_of_a_step(layers: Sequence[Any]) -> Iterator[None]:
    """While inside, `step_attention` means these layers."""
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
    """Append one token to a layer of the cache in a step, and attend all of it.

    Args:
        query: [B, Hq, 1, D].
        keys: [B, Hkv, 1, D].
        values: [B, Hkv, 1, Dv].
        layer: its number.
        scaling: factor on q.k.
        softcap: as for `quantpress.kernels.attend.attend`.
        sinks: as there.

    Returns:
        [B, 1, Hq, Dv] in the query's dtype.
    """
    from quantpress.cache.attention.dispatch import attend_step

    own = _local.layers[layer]
    own.update(keys, values)
    return attend_step(query, own.fixed.step_segments(), scaling, softcap, sinks)


@step_attention.register_fake
def _(query: torch.Tensor, keys: Any, values: torch.Tensor, *rest: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], values.shape[-1])
