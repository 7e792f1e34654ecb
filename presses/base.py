"""What every press of ours has: `|`, traits, one thread at a time, an error where nothing is cached."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from kvpress import BasePress
from transformers.modeling_utils import PreTrainedModel

from quantpress.presses.models.filling import filled_caches
from quantpress.presses.models.lock import model_lock
from quantpress.presses.traits import Trait, describe


class PressMixin:
    """The first base of each of our presses, before a class of kvpress.

    Keywords of the class statement are the press's traits: `class Mine(PressMixin, BasePress, at_exit=True)`.
    `SnapKV(0.5) | TurboQuant(4)` is `Compose([SnapKV(0.5), TurboQuant(4)])`; the other side may be any press
    or press class.
    """

    composition: ClassVar[Any]
    """The class that `|` makes an instance of. `compose.py` sets it to `Compose`."""

    def __init_subclass__(cls, **traits: Trait) -> None:
        super().__init_subclass__()
        if traits:
            describe(cls, **traits)

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """Apply the press to every prefill inside the context; other threads wait for the model meanwhile.

        Raises:
            UnsupportedModelError, InvalidInputError: see `filled_caches`.
        """
        upstream: Any = super()
        with model_lock(model), filled_caches(model), upstream.__call__(model):
            yield

    def __or__(self, other: Any) -> Any:
        return self.composition([self, other]) if _is_press(other) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return self.composition([other, self]) if _is_press(other) else NotImplemented


def name_of(press: BasePress) -> str:
    """Name of a press's class."""
    return type(press).__name__


def short_repr(press: Any) -> str:
    """A press as one would write it: its first argument, and those that differ from their defaults."""
    made = getattr(press, "__dataclass_params__", None)
    if made is None or not made.repr:  # such as `Compose`, which has a short repr itself
        return repr(press)
    parts = []
    for index, field in enumerate(field for field in fields(press) if field.init and field.repr):
        value = getattr(press, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown = short_repr(value) if isinstance(value, BasePress) else repr(value)
        if index == 0:
            parts.append(shown)
        elif value != default:
            parts.append(f"{field.name}={shown}")
    return f"{type(press).__name__}({', '.join(parts)})"


def _is_press(press: Any) -> bool:
    return isinstance(press, BasePress) or (isinstance(press, type) and issubclass(press, BasePress))
