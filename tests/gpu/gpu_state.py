"""What a test on a GPU may change for a while, and what it must leave as it was."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """An operation that waits for the device raises a RuntimeError inside; the former mode comes back."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        set_sync_debug_mode("error")
        yield
    finally:
        set_sync_debug_mode(before)


def set_sync_debug_mode(mode: int | str) -> None:
    """torch sets the mode first, then says once in a process that it is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


def process_state() -> dict[str, Any]:
    """What every later test of the process depends on."""
    return {
        "sync_debug_mode": torch.cuda.get_sync_debug_mode(),
        "current_device": torch.cuda.current_device(),
        "current_stream": torch.cuda.current_stream(),
        "default_device": torch.get_default_device(),
        "default_dtype": torch.get_default_dtype(),
        "float32_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
