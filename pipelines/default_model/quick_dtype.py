"""The dtype that a model is loaded in: which may be asked for, and which the default model has otherwise."""

import functools
import os
import time
from typing import TYPE_CHECKING, Any

from quantpress.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

VARIABLE = "QUANTPRESS_DTYPE"
NAMES = ("bfloat16", "float32", "float16")
ROUNDS = 5


def quick_dtype() -> "torch.dtype":
    """The dtype that the default model is loaded in, unless its caller names one.

    `QUANTPRESS_DTYPE` if set; bfloat16 if there is a CUDA device, or if this CPU multiplies bfloat16 faster
    than float32; else float32. The speed is measured once a process.

    Raises:
        InvalidInputError: `QUANTPRESS_DTYPE` is not bfloat16, float32 or float16.
    """
    import torch

    dtype: torch.dtype = getattr(torch, forced_name() or _quicker_name())
    return dtype


def forced_name() -> str | None:
    """The value of `QUANTPRESS_DTYPE`; None if it is not set, or empty.

    Raises:
        InvalidInputError: the value is not one of `NAMES`.
    """
    name = os.environ.get(VARIABLE) or None
    if name is not None and name not in NAMES:
        raise InvalidInputError(f"{VARIABLE} is {name!r}; set it to {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    return name


def check_dtype(dtype: Any) -> None:
    """Refuse a dtype that no model can be loaded in: transformers would load float32 instead.

    Args:
        dtype: what `from_pretrained` is given: a dtype or its name, "auto", a dict of them, or None.

    Raises:
        InvalidInputError: it is none of these, or not a dtype of floating point.
    """
    import torch

    for one in dtype.values() if isinstance(dtype, dict) else [dtype]:
        kind = getattr(torch, one, None) if isinstance(one, str) else one
        if one in (None, "auto") or (isinstance(kind, torch.dtype) and kind.is_floating_point):
            continue
        raise InvalidInputError(f"dtype is {one!r}; use {', '.join(NAMES[:-1])} or {NAMES[-1]}")


@functools.cache
def _quicker_name() -> str:
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    seconds: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    for _ in range(ROUNDS):  # in turns, and the best time counts: the machine may be busy for a while
        for name, times in seconds.items():
            kind = getattr(torch, name)
            left = torch.ones(512, 576, dtype=kind, device="cpu")
            right = torch.ones(576, 1536, dtype=kind, device="cpu")
            begin = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - begin)
    return min(seconds, key=lambda name: min(seconds[name]))
