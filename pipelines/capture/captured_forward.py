"""Whose captured steps a forward goes to, where several threads use one model."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from quantpress.pipelines.replaced import Replaced
from quantpress.presses.models.lock import model_lock

Steps = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Opened:
    """One context of `captured_decoding` that is open.

    Args:
        steps: takes the place of the model's forward.
        thread: that has opened it.
        shared: whether forwards of other threads go to it too.
    """

    steps: Steps
    thread: threading.Thread
    shared: bool


class CapturedForward(Replaced):
    """What stands in the place of a model's forward while any `captured_decoding` is open.

    A forward goes to the steps that its own thread has opened last; else to those that were opened last of
    the shared ones, unless its thread has a press or a pipeline call of its own on the model.

    Args:
        model: whose forward it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._opened: list[Opened] = []
        super().__init__(model, "forward", self._to_steps)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CapturedForward":
        """The one that is there, or a new one; call it with the model's lock held."""
        forward = vars(model).get("forward")
        return forward if isinstance(forward, CapturedForward) else cls(model)

    def open(self, steps: Steps, shared: bool) -> Opened:
        """Send forwards to steps, until `close` is called with what this returns."""
        opened = Opened(steps, threading.current_thread(), shared)
        self._opened = [*self._opened, opened]
        return opened

    def close(self, opened: Opened) -> None:
        """Send no more; the last one puts the model's own forward back."""
        self._opened = [other for other in self._opened if other is not opened]
        if not self._opened and vars(self.owner).get(self.name) is self:
            self.undo()

    def _to_steps(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        opened, this = self._opened, threading.current_thread()
        chosen = [other for other in opened if other.thread is this]
        if not chosen and not model_lock(self.owner).held:
            chosen = [other for other in opened if other.shared]
        return (chosen[-1].steps if chosen else forward)(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _itself, (self.original,)  # a copy of the model has contexts of its own


def _itself(forward: Any) -> Any:
    return forward
