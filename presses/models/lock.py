"""One thread at a time on a model.

Presses put hooks, attributes and other forwards on a model, and a forward in another thread would run through
them. So whatever changes a model for a while holds the model's lock meanwhile, and other threads wait for
their turn.
"""

import warnings
import weakref
from collections import deque
from threading import Event, Lock, Thread, current_thread

from torch import nn

from quantpress.errors import UnsupportedModelError
from quantpress.presses.models.attention import decoder_of

PATIENCE_S = 60.0
"""Seconds after which a waiting thread warns, and says what it waits for."""


class ModelLock:
    """A reentrant lock that is handed on in the order in which threads asked for it.

    Unlike `threading.RLock`, it may be released by a different thread than the one that took it, because a
    web framework may leave a context in another worker than the one that entered it.
    """

    def __init__(self) -> None:
        self._guard = Lock()
        self._owner: Thread | None = None
        self._depth = 0
        self._waiting: deque[tuple[Thread, Event]] = deque()

    @property
    def held(self) -> bool:
        """Whether this thread has the lock."""
        return self._owner is current_thread()

    def __enter__(self) -> None:
        this = current_thread()
        with self._guard:
            if self._owner is None or self._owner is this:
                self._owner, self._depth = this, self._depth + 1
                return
            turn = Event()
            self._waiting.append((this, turn))
        try:
            if not turn.wait(PATIENCE_S):
                self._warn()
                turn.wait()
        except BaseException:  # such as KeyboardInterrupt
            self._give_up(turn)
            raise

    def __exit__(self, *exception: object) -> None:
        with self._guard:
            self._depth -= 1
            if self._depth:
                return
            if not self._waiting:
                self._owner = None
                return
            self._owner, turn = self._waiting.popleft()
            self._depth = 1
            turn.set()

    def _give_up(self, turn: Event) -> None:
        """Leave the queue, or hand on the turn if it has come meanwhile."""
        with self._guard:
            if not turn.is_set():
                self._waiting = deque(entry for entry in self._waiting if entry[1] is not turn)
                return
        self.__exit__()

    def _warn(self) -> None:
        owner = self._owner
        warnings.warn(
            f"{current_thread().name} has waited {PATIENCE_S:.0f} s for a model that "
            f"{'another thread' if owner is None else owner.name} has a press, chunked_prefill or a pipeline "
            "call on, and goes on waiting; if that thread waits for this one, leave its `with` block first",
            stacklevel=4,
        )


_LOCKS: "weakref.WeakKeyDictionary[nn.Module, ModelLock]" = weakref.WeakKeyDictionary()
_LOOKING_UP = Lock()


def model_lock(model: nn.Module) -> ModelLock:
    """The lock of a model, shared by the model, its backbone and adapters around it.

    A copy of a model has its own lock.

    Raises:
        UnsupportedModelError: something else is given as a model.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with model_lock(model):
        ...     model_lock(model).held
        True
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a {type(model).__name__} is no model; give one of transformers")
    with _LOOKING_UP:
        return _LOCKS.setdefault(decoder_of(model), ModelLock())
