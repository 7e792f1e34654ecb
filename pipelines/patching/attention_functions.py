"""Where attention calls are found: transformers' attention functions, and torch's own.

They are taken over while a patched forward runs, in any thread; a call goes through a round trip only where
`TRIP` holds one, which is in the thread of that forward.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache.attention.dispatch import model_eager_attention
from quantpress.cache.attention.states import PackedStates
from quantpress.errors import InvalidInputError
from quantpress.pipelines.patching.round_trip import RoundTrip

SDPA = "scaled_dot_product_attention"

TRIP: ContextVar[RoundTrip | None] = ContextVar("round trip", default=None)


def _patched(query: torch.Tensor, keys: Any, values: Any, attention: Any, name: str) -> Any:
    """An attention call; the functions that it calls itself are not patched once more."""
    trip = TRIP.get()
    if trip is None:
        return attention(keys, values)
    if isinstance(keys, PackedStates) or isinstance(values, PackedStates):
        raise InvalidInputError(
            "the cache is packed already, and its keys and values would be quantized twice; use the patch "
            "without a press, and disable(model) before"
        )
    token = TRIP.set(None)
    try:
        return trip.attend(query, keys, values, attention, name)
    finally:
        TRIP.reset(token)


class _PatchedFunctions(TorchFunctionMode):
    """Finds calls of `scaled_dot_product_attention` by whatever name.

    It does not see those inside other functions of torch (multi-head attention): for them the name in
    torch.nn.functional is taken over too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _own_sdpa or TRIP.get() is None:
            return func(*args, **kwargs)
        return _patched_sdpa(*args, **kwargs)


_own_sdpa = F.scaled_dot_product_attention


@functools.wraps(_own_sdpa)
def _patched_sdpa(query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return _patched(query, key, value, lambda k, v: _own_sdpa(query, k, v, *args, **kwargs), SDPA)


class _Running:
    """How many patched forwards run now, in all threads."""

    count = 0
    lock = threading.Lock()


@contextmanager
def functions_taken_over() -> Iterator[None]:
    """Around a patched forward: attention calls of this thread go through what `TRIP` holds."""
    with _Running.lock:
        _Running.count += 1
        if _Running.count == 1:
            _take_over()
    try:
        with _PatchedFunctions():
            yield
    finally:
        with _Running.lock:
            _Running.count -= 1
            if not _Running.count:
                _give_back()


def _take_over() -> None:
    F.scaled_dot_product_attention = _patched_sdpa
    for name in list(ALL_ATTENTION_FUNCTIONS.keys()):
        if "paged" not in name:
            ALL_ATTENTION_FUNCTIONS[name] = _Interface(ALL_ATTENTION_FUNCTIONS[name])
    if "eager" not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS["eager"] = _Interface(model_eager_attention)


def _give_back() -> None:
    if F.scaled_dot_product_attention is _patched_sdpa:
        F.scaled_dot_product_attention = _own_sdpa
    for name in list(ALL_ATTENTION_FUNCTIONS.keys()):
        function = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(function, _Interface):
            continue  # something was put on top since: ours does nothing any more
        if function.original is model_eager_attention:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = function.original


class _Interface:
    """One of transformers' attention functions."""

    def __init__(self, original: Any) -> None:
        self.original = original
        functools.update_wrapper(self, original, updated=())

    def __call__(
        self, module: Any, query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def attention(keys: Any, values: Any) -> Any:
            return self.original(module, query, keys, values, *args, **kwargs)

        return _patched(query, key, value, attention, type(module).__name__)
