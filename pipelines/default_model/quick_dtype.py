"""The dtype of the default model: the user's choice, else the faster of bfloat16 and float32 here."""

import functools
import os
import time
from typing import TYPE_CHECKING

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
