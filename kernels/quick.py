"""Launches of Triton kernels that take the host less time.

Before each launch Triton binds all arguments, looks at every one of them, compares the constants that the
kernel reads, and makes a key of it all. `quick` does so once for each kind of call and keeps what Triton
compiled for it.
"""

from typing import Any

from torch import Tensor

MOST_KEPT = 512
"""Kinds of calls that a kernel keeps. Each length of a context is one, since numbers count by their value."""


class QuickKernel:
    """A kernel of Triton or Gluon, launched as itself: `quick(kernel)[grid](*arguments, **options)`.

    Args:
        kernel: of `triton.jit`. One of the interpreter, which compiles nothing, is run as it is.
    """

    def __init__(self, kernel: Any) -> None:
        self.jit = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            given = (*arguments, *named.values())
            kinds, passed = _described(given)
            key = (*named, *map(type, given), *kinds)
            compiled = self._compiled.get(key)
            if compiled is None:
                self._compile(key, self.jit[grid](*arguments, **named))
                return
            count = len(arguments)
            by_name = dict(zip(named, passed[count:], strict=True))
            rest = (by_name[name] for name in self.jit.arg_names[count:])
            compiled[(*grid, 1, 1)[:3]](*passed[:count], *rest)

        return launch

    def _compile(self, key: tuple[Any, ...], compiled: Any) -> None:
        if compiled is not None:
            if len(self._compiled) >= MOST_KEPT:
                self._compiled.clear()
            self._compiled[key] = compiled


def _described(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """All that Triton compiles for, and what its launcher is given.

    Of a tensor these are dtype, alignment and device, and its address: of a tensor itself the launcher would
    ask the driver where it lies. Of other arguments both are the value.
    """
    kinds, passed = list[Any](), list[Any]()
    for one in arguments:
        if isinstance(one, Tensor):
            address = one.data_ptr()
            kinds.append((one.dtype, address % 16, one.get_device()))
            passed.append(address)
        else:
            kinds.append(one)
            passed.append(one)
    return kinds, passed


_QUICK: dict[int, QuickKernel] = {}


def quick(kernel: Any) -> QuickKernel:
    """The `QuickKernel` of a kernel, the same one each time."""
    found = _QUICK.get(id(kernel))
    if found is None or found.jit is not kernel:
        found = _QUICK[id(kernel)] = QuickKernel(kernel)
    return found
