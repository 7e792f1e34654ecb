"""The only writer of transformers' attention functions, `ALL_ATTENTION_FUNCTIONS`, which all models share.

Packed layers, live patches and the evaluation each need attention functions that do something more. Each of
them is a `FunctionWrapper`, which counts its users. While it has any, every function in the table is wrapped;
when the last has gone, the table holds the same names and the same objects as before.

Several wrappers may be in place at once and may go in any order: what is in the table is always the original
function inside the wrappers that are in use now. A function that somebody else puts into the table meanwhile,
around ours or instead of it, stays there. kvpress wraps all of them when it is imported, and
`quantpress.task` has it wrap the original functions, so that its wrappers always lie inside.
"""

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from quantpress.errors import UnsupportedModelError

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]

TORCH_ATTENTION = "torch.nn.functional.scaled_dot_product_attention"
"""The name under which wrappers are given torch's own attention function."""


@cache
def _table() -> Any:
    """transformers' `ALL_ATTENTION_FUNCTIONS`. Its module takes a second to import."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _own() -> dict[str, AttentionFunction]:
    """The entries of this table alone."""
    own: dict[str, AttentionFunction] = _table()._local_mapping
    return own


def _common() -> dict[str, Any]:
    """The entries of every such table."""
    common: dict[str, Any] = type(_table())._global_mapping
    return common


MOST_KEPT = 100
"""How many functions a wrapper remembers, more than are ever in use at once."""


def model_eager_attention(
    module: torch.nn.Module, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The eager attention that the module's own modelling file defines.

    transformers has no entry "eager" in its table; this is the function inside the one that wrappers add.
    """
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no eager_attention_forward in {type(module).__module__}; "
            'load the model with attn_implementation="sdpa"'
        )
    result: tuple[torch.Tensor, torch.Tensor | None] = function(module, *args, **kwargs)
    return result


class FunctionWrapper:
    """A way to wrap attention functions, in place while it has users.

    Args:
        wrap: is given a function and its name, and returns a plain Python function that calls it, or the
            function itself to leave this name alone. It is asked once for each function, so that the table
            gets the same objects again; torch.compile guards on them.
        rank: wrappers of higher rank lie outside.

    Attributes:
        users: how many there are now.
    """

    def __init__(self, wrap: Callable[[AttentionFunction, str], AttentionFunction], rank: int = 0) -> None:
        self._wrap, self.rank, self.users = wrap, rank, 0
        self._made: dict[tuple[str, int], tuple[AttentionFunction, AttentionFunction]] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """One more user, until the block ends."""
        _OWNER.add_users(self, 1)
        try:
            yield
        finally:
            _OWNER.add_users(self, -1)

    def in_place_while_alive(self, user: object) -> None:
        """One more user, until it is deleted, or collected if it is part of a reference cycle."""
        _OWNER.add_users(self, 1)
        weakref.finalize(user, _OWNER.add_users, self, -1, wait=False).atexit = False

    def around(self, function: AttentionFunction, name: str) -> AttentionFunction:
        """The function that wraps this one under this name."""
        key = name, id(function)
        both = self._made.pop(key, None) or (function, self._wrap(function, name))
        self._made[key] = both  # the latest used is the last
        if len(self._made) > MOST_KEPT:
            del self._made[next(iter(self._made))]
        return both[1]


class _Owner:
    """Keeps the table in step with the users of all wrappers.

    Users come and go in any thread, and the garbage collector takes some away in the middle of any operation.
    So every change is put into a queue first, and whoever has the lock works the queue off.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._at_work = False
        self._changes: deque[Callable[[], bool]] = deque()  # each returns whether the table must be updated
        self._in_use: list[FunctionWrapper] = []  # innermost first
        self._inside: weakref.WeakKeyDictionary[Any, AttentionFunction] = weakref.WeakKeyDictionary()
        self._hiding: set[str] = set()  # names whose entry hides one of `_common`, or has none there
        self._updated: tuple[object, ...] = ()  # what `_update` has left behind

    def add_users(self, wrapper: FunctionWrapper, users: int, wait: bool = True) -> None:
        """Change the users of a wrapper; without `wait`, the thread that is at work may finish it later."""

        def add() -> bool:
            wrapper.users += users
            if wrapper.users and wrapper not in self._in_use:
                self._in_use = sorted([*self._in_use, wrapper], key=lambda one: one.rank)
            elif not wrapper.users:
                self._in_use = [one for one in self._in_use if one is not wrapper]
            return users > 0 or not wrapper.users

        self._change(add, wait)

    def originals(self) -> dict[str, AttentionFunction]:
        """What others have put into the table, by name, as it is without any wrapper."""
        with self._lock:
            return {
                name: self._original(function)
                for name, function in dict(_own()).items()
                if name not in self._hiding or not self._is_ours(function)
            }

    def put_back(self, before: dict[str, AttentionFunction]) -> None:
        """Undo what others have put into the table since `originals` returned `before`; wrappers stay."""

        def put() -> bool:
            now = self.originals()
            for name in now.keys() - before.keys():
                _own().pop(name, None)
            _table().update({name: f for name, f in before.items() if now.get(name) is not f})
            return True

        self._change(put, wait=True)

    def wrap_originals(self, wrap: Callable[[AttentionFunction], AttentionFunction]) -> None:
        """Wrap every function of the table as others have put it there; our wrappers stay around it."""

        def put() -> bool:
            names = set(_table()) - (self._hiding - _common().keys())
            for name in names:
                there = _common()[name] if name in self._hiding else self._original(_table()[name])
                _table()[name] = wrap(there)
            return True

        self._change(put, wait=True)

    def _change(self, change: Callable[[], bool], wait: bool) -> None:
        self._changes.append(change)
        while self._lock.acquire(blocking=wait):
            try:
                if self._at_work:  # the garbage collector ran inside of the call that is at work and goes on
                    return
                self._work_off()
            finally:
                self._lock.release()
            if not self._changes:
                return
            wait = False

    def _work_off(self) -> None:
        self._at_work = True
        try:
            outdated = False
            while self._changes:
                outdated = self._changes.popleft()() or outdated
            if outdated:
                self._update()
        finally:
            self._at_work = False

    def _update(self) -> None:
        if self._updated == self._present():  # every packed layer comes here
            return
        for name in {*_table(), "eager"}:
            self._update_entry(name)
        original: Any = self._original(F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = self._wrapped(original, TORCH_ATTENTION)  # type: ignore[assignment]
        self._updated = self._present()

    def _present(self) -> tuple[object, ...]:
        return dict(_own()), dict(_common()), F.scaled_dot_product_attention, tuple(self._in_use)

    def _update_entry(self, name: str) -> None:
        there = _own().get(name)
        if there is not None and not self._is_ours(there):
            self._hiding.discard(name)
        if there is None or name in self._hiding:
            original = _common().get(name, model_eager_attention)
        else:
            original = self._original(there)
        wrapped = self._wrapped(original, name)
        if wrapped is not original:
            if there is None:
                self._hiding.add(name)
            _table()[name] = wrapped
        elif name in self._hiding:
            self._hiding.discard(name)
            _own().pop(name, None)
        elif there is not None and there is not original:
            _table()[name] = original

    def _wrapped(self, original: AttentionFunction, name: str) -> AttentionFunction:
        function = original
        for wrapper in self._in_use:
            outer = wrapper.around(function, name)
            if outer is not function:
                self._inside[outer] = function
            function = outer
        return function

    def _is_ours(self, function: Any) -> bool:
        return isinstance(function, FunctionType) and function in self._inside

    def _original(self, function: Any) -> AttentionFunction:
        while self._is_ours(function):
            function = self._inside[function]
        return function  # type: ignore[no-any-return]


_OWNER = _Owner()
original_functions = _OWNER.originals
put_back_functions = _OWNER.put_back
wrap_original_functions = _OWNER.wrap_originals
