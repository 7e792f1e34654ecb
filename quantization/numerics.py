"""Arithmetic in the dtypes that the code names, whatever settings of torch are in force.

`torch.autocast` would run our float32 products in 16 bits, and `torch.set_float32_matmul_precision` would run
those of a rotation in TF32 or bfloat16. What is stored must depend on neither. The default dtype and the
default device need no such care: every factory call in this package names both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

_KINDS = ("cpu", "cuda")
_FULL_PRECISION = ("ieee", "none")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn `torch.autocast` off in this thread while the context lasts."""
    kinds = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)


def in_named_dtypes(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function to run without `torch.autocast`."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not any(map(torch.is_autocast_enabled, _KINDS)):  # every layer of a step comes here
            return function(*args, **kwargs)
        with without_autocast():
            return function(*args, **kwargs)

    return call


@in_named_dtypes
def exact_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, to the precision of its dtype.

    Where torch may multiply float32 matrices in lower precision, the product is computed in float64 and
    rounded once. The setting itself is not touched, since it holds for all threads.

    Args:
        x: [..., C] float32 or float64.
        matrix: [C, K], of x's dtype.

    Returns:
        [..., K] of x's dtype.
    """
    if x.dtype == torch.float32 and _multiplies_in_less(x.device.type):
        return (x.double() @ matrix.double()).float()
    return x @ matrix


def _multiplies_in_less(kind: str) -> bool:
    """Whether torch may multiply float32 matrices on this kind of device in TF32 or bfloat16."""
    backends: Any = torch.backends
    backend = {"cuda": backends.cuda, "cpu": backends.mkldnn}.get(kind)
    return backend is not None and backend.matmul.fp32_precision not in _FULL_PRECISION
