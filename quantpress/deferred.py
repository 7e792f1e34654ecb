"""Checks of numbers that only a device knows, read for many tensors at once.

Reading a number makes the host wait for the device, and the device then waits for the next kernels. `judge`
hands numbers to a verdict, which raises an error or takes note of them. It reads them at once, unless it is
called inside `DeferredChecks.collecting`: there it keeps them, and `settle` reads all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby

import torch
from torch import Tensor

Verdict = Callable[[list[float]], None]

ZEROS_AT_ONCE = 256


class DeferredChecks:
    """Verdicts that wait for their numbers.

    Attributes:
        narrowed: by the id of a plane with scales in float32, the same in float16, where verdicts have found
            that they fit.
        held_bytes: what the planes given to `hold` take beyond float16 at their verdicts, where they are held
            in both.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[tuple[Tensor, ...], Verdict]] = []
        self.narrowed: dict[int, Tensor] = {}
        self.held_bytes = 0
        self._wide: list[Tensor] = []
        self._halves: dict[int, Tensor] = {}
        self._zeros: dict[torch.device, list[Tensor]] = {}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep what `judge` is given inside the block, in this thread, until `settle`."""
        token = _COLLECTING.set(self)
        try:
            yield
        finally:
            _COLLECTING.reset(token)

    def defer(self, numbers: tuple[Tensor, ...], verdict: Verdict) -> None:
        """Keep numbers for a verdict."""
        self._waiting.append((numbers, verdict))

    def hold(self, planes: list[Tensor]) -> None:
        """Planes with scales in float32, which a verdict may `narrow`."""
        self._wide += planes
        self.held_bytes += sum(plane.nbytes for plane in planes)

    def narrow(self, planes: list[Tensor]) -> None:
        """Planes that `hold` was given fit into float16; for verdicts, inside `settle`."""
        self.narrowed.update({id(plane): self._halves[id(plane)] for plane in planes})

    def zeros(self, device: torch.device) -> Tensor:
        """[4] int32, handed out once."""
        left = self._zeros.get(device)
        if not left:
            with torch.inference_mode(False), torch.no_grad():
                many = torch.zeros(ZEROS_AT_ONCE, 4, dtype=torch.int32, device=device)
            left = self._zeros[device] = list(many.unbind())
        return left.pop()

    def settle(self) -> None:
        """Give each verdict its numbers, in the order in which they came; raises what the first one raises.

        The host waits once for each device.
        """
        waiting, self._waiting = self._waiting, []
        self._halves = {id(plane): plane.half() for plane in self._wide}  # while the device is busy
        read = _read([one for numbers, _ in waiting for one in numbers])
        for numbers, verdict in waiting:
            verdict([number for _ in numbers for number in next(read)])


@contextmanager
def checked_at_once() -> Iterator[None]:
    """Inside, `judge` reads numbers at once, whatever is collected outside."""
    token = _COLLECTING.set(None)
    try:
        yield
    finally:
        _COLLECTING.reset(token)


_COLLECTING: ContextVar[DeferredChecks | None] = ContextVar("collecting", default=None)


def deferred_checks() -> DeferredChecks | None:
    """The checks that are collected here and now; None: checks are made at once."""
    return _COLLECTING.get()


def judge(verdict: Verdict, *numbers: Tensor) -> None:
    """Give numbers to a verdict, at once or when the checks collected here are settled.

    Args:
        verdict: is given the numbers of all tensors in one list.
        numbers: of any shape and dtype; nothing may be written to them afterwards.
    """
    checks = deferred_checks()
    if checks is not None:
        checks.defer(numbers, verdict)
    else:
        verdict([number for part in _read(list(numbers)) for number in part])


def zero_flags(count: int, device: torch.device) -> Tensor:
    """Zeros [count] int32 for kernels to write to, at a multiple of 16 bytes; count is at most 4.

    Where checks are collected, many are made at once: each launch that fills them costs the host time.
    """
    checks = deferred_checks()
    if checks is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    return checks.zeros(device).narrow(0, 0, count)


def _read(numbers: list[Tensor]) -> Iterator[list[float]]:
    """The numbers of each tensor on the host; waits for each device once."""
    found: list[list[float]] = [[] for _ in numbers]
    kinds = sorted(range(len(numbers)), key=lambda i: (str(numbers[i].device), str(numbers[i].dtype)))
    for _, of_device in groupby(kinds, key=lambda i: numbers[i].device):
        members, parts = list[int](), list[Tensor]()
        for _, of_dtype in groupby(of_device, key=lambda i: numbers[i].dtype):
            alike = list(of_dtype)
            members += alike
            part = torch.cat([numbers[i].reshape(-1) for i in alike])
            parts.append(part.float() if part.device.type == "mps" else part.double())  # MPS has no float64
        flat, start = torch.cat(parts).tolist(), 0
        for i in members:
            end = start + numbers[i].numel()
            found[i], start = flat[start:end], end
    return iter(found)
