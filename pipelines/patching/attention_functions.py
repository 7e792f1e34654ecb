"""Where attention calls are found: in transformers' attention functions, and in torch's own.

These functions are wrapped while a patched forward runs in any thread. A call goes through a round trip only
where `TRIP` holds one, which is in the thread of that forward.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from quantpress.cache.attention.functions import TORCH_ATTENTION, AttentionFunction, FunctionWrapper
from quantpress.cache.attention.states import PackedStates
from quantpress.errors import InvalidInputError
from quantpress.pipelines.patching.round_trip import RoundTrip

SDPA = "scaled_dot_product_attention"

TRIP: ContextVar[RoundTrip | None] = ContextVar("round trip", default=None)


def _patched(query: torch.Tensor, keys: Any, values: Any, attention: Any, name: str) -> Any:
    """One attention call. The functions that it calls in turn are not patched again."""
    trip = TRIP.get()
    if trip is None:
        return attention(keys, values)
    if isinstance(keys, PackedStates) or isinstance(values, PackedStates):
        raise InvalidInputError(
            "the cache is packed already, so its keys and values would be quantized twice; use the patch "
            "without a press, and call disable(model) before"
        )
    token = TRIP.set(None)
    try:
        return trip.attend(query, keys, values, attention, name)
    finally:
        TRIP.reset(token)


def _torch_patched(function: AttentionFunction) -> AttentionFunction:
    @functools.wraps(function)
    def patched(query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return _patched(query, key, value, lambda k, v: function(query, k, v, *args, **kwargs), SDPA)

    return patched


def _transformers_patched(function: AttentionFunction) -> AttentionFunction:
    @functools.wraps(function)
    def patched(module: Any, query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        def attention(keys: Any, values: Any) -> Any:
            return function(module, query, keys, values, *args, **kwargs)

        return _patched(query, key, value, attention, type(module).__name__)

    return patched


def _patched_by_name(function: AttentionFunction, name: str) -> AttentionFunction:
    if name == TORCH_ATTENTION:
        return _torch_patched(function)
    return function if "paged" in name else _transformers_patched(function)


_PATCH = FunctionWrapper(_patched_by_name, rank=1)
_own_sdpa: Any = F.scaled_dot_product_attention
_patched_sdpa = _torch_patched(_own_sdpa)


class _PatchedFunctions(TorchFunctionMode):
    """Finds calls of `scaled_dot_product_attention` by any name.

    It does not see calls inside other functions of torch (multi-head attention); those find the wrapped
    function in torch.nn.functional.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _own_sdpa or TRIP.get() is None:
            return func(*args, **kwargs)
        return _patched_sdpa(*args, **kwargs)


@contextmanager
def functions_taken_over() -> Iterator[None]:
    """Around a patched forward: attention calls of this thread go through the round trip in `TRIP`."""
    with _PATCH.in_place(), _PatchedFunctions():
        yield
