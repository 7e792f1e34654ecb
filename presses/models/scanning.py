"""Scans of all modules of a model. Before a context is read they are many, and the GPU waits for each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

Scan = Callable[[nn.Module], list[nn.Module]]

_FOUND: ContextVar[dict[tuple[Scan, nn.Module], list[nn.Module]] | None] = ContextVar("found", default=None)


@contextmanager
def scanned_once() -> Iterator[None]:
    """While inside, in this thread, each scan of a model is made once: its modules must not be replaced."""
    token = _FOUND.set({})
    try:
        yield
    finally:
        _FOUND.reset(token)


def found_once(scan: Scan, root: nn.Module) -> list[nn.Module]:
    """What a scan finds below a module, root included; not to be changed. In `scanned_once` it is kept."""
    known = _FOUND.get()
    if known is None:
        return scan(root)
    if (scan, root) not in known:
        known[scan, root] = scan(root)
    return known[scan, root]


def modules_below(root: nn.Module) -> list[nn.Module]:
    """As `root.modules()`, in a quarter of the time; not to be changed."""
    return found_once(_all_below, root)


def _all_below(root: nn.Module) -> list[nn.Module]:
    waiting: list[nn.Module | None] = [root]
    found: dict[nn.Module, None] = {}
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                waiting.extend(reversed(module._modules.values()))
    return list(found)
