"""Small tensors that are made once."""

from collections.abc import Callable, Hashable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


_MISSING: Any = object()


def _in_a_graph() -> bool:
    """Whether a graph is being made, whose tensors are its own and may be filled when it runs only."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Kept(Generic[_P, _R]):
    """A function whose results are made once each, and kept for as long as the process lives.

    A captured graph reads tables by address, long after the call that asked for them: what a cache of
    bounded size lets go of would be given to other tensors, and the graph would read those. For the same
    reason threads that ask at the same time get the same result. Results are made outside inference mode and
    without gradients, so that any mode may use them. What is made while a graph is captured or compiled is
    that graph's, and not kept.

    Args:
        make: its arguments can be hashed; its results are small, and nobody writes to them.
    """

    def __init__(self, make: Callable[_P, _R]) -> None:
        update_wrapper(self, make)
        self._make = make
        self._made: dict[Hashable, Any] = {}

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        key = (args, *kwargs.items()) if kwargs else args
        found = self._made.get(key, _MISSING)
        if found is _MISSING:
            if _in_a_graph():
                return self._make(*args, **kwargs)
            with torch.inference_mode(False), torch.no_grad():
                found = self._made.setdefault(key, self._make(*args, **kwargs))
        made: _R = found
        return made

    def cache_clear(self) -> None:
        """Forget all results, which no captured graph may read then; for tests."""
        self._made.clear()


kept = Kept
"""The same as a decorator."""
