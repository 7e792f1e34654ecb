"""Functions that are called by name from a namespace, and replaced there for what one thread does.

A namespace is a `__dict__`: that of a module of a model, in which its `forward` is looked up first, or that
of a Python module. While any thread replaces a name, a `Seam` stands there, which sends the calls of that
thread to its replacement and the calls of all others to the function itself.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Run = Callable[..., Any]
"""Called with the function that it stands in for, and the arguments of the call."""

_installing = threading.Lock()
_local = threading.local()


@dataclass(frozen=True, eq=False)
class Named:
    """A function in a namespace.

    Args:
        namespace: where it is looked up.
        name: its name there.
        function: what a call finds there now, or finds in a class if the namespace has no such name.
    """

    namespace: dict[str, Any]
    name: str
    function: Run


class Seam:
    """Stands in a namespace in place of a function, while a thread replaces it.

    Args:
        function: the function.
        in_namespace: whether the namespace had it, and not a class.
    """

    def __init__(self, function: Run, in_namespace: bool) -> None:
        self.function, self.in_namespace, self.users = function, in_namespace, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = getattr(_local, "runs", {}).get(self)
        return self.function(*args, **kwargs) if run is None else run(self.function, *args, **kwargs)


def function_in(namespace: dict[str, Any], name: str) -> Run | None:
    """The function of this name, behind a `Seam` of another thread too; None if the namespace has none."""
    found = namespace.get(name)
    return found.function if isinstance(found, Seam) else found


@contextmanager
def replaced_here(replacements: Sequence[tuple[Named, Run]]) -> Iterator[None]:
    """While inside, calls that this thread makes by these names go to their replacements.

    At the end every namespace is as it was, unless something else has replaced the name meanwhile.
    """
    seams: list[tuple[Named, Seam]] = []
    outside = getattr(_local, "runs", {})
    try:
        with _installing:
            for named, _ in replacements:
                seams.append((named, _install(named)))
        _local.runs = outside | {seam: run for (_, seam), (_, run) in zip(seams, replacements, strict=True)}
        yield
    finally:
        _local.runs = outside
        with _installing:
            for named, seam in seams:
                _remove(named, seam)


def _install(named: Named) -> Seam:
    there = named.namespace.get(named.name)
    seam = there if isinstance(there, Seam) else Seam(named.function, there is not None)
    seam.users += 1
    named.namespace[named.name] = seam
    return seam


def _remove(named: Named, seam: Seam) -> None:
    seam.users -= 1
    if seam.users or named.namespace.get(named.name) is not seam:
        return
    if seam.in_namespace:
        named.namespace[named.name] = seam.function
    else:
        del named.namespace[named.name]
