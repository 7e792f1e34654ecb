"""What a press may be made of: its arguments by name, number and value, and presses given as classes."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Protocol, runtime_checkable

import torch

from quantpress.errors import InvalidInputError, did_you_mean
from quantpress.presses.base_press import BasePress, ScorerPress
from quantpress.presses.traits import short_repr

_KINDS: dict[Any, tuple[type, str]] = {
    bool: (bool, "True or False"),
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
}

_AT_LEAST_ONE = frozenset(
    {
        "block_size",
        "chunk_length",
        "chunk_size",
        "kernel_size",
        "lag_size",
        "local_window_size",
        "sketch_dimension",
        "window_size",
    }
)
"""Whole numbers of kvpress's presses that count tokens or channels of a piece. The others may be 0."""


def is_press(press: Any) -> bool:
    """Whether this is a press, a press class, or several classes joined by `|`."""
    if isinstance(press, UnionType):
        return all(map(is_press, press.__args__))
    return isinstance(press, BasePress) or (isinstance(press, type) and issubclass(press, BasePress))


def one_by_one(press: Any) -> tuple[Any, ...]:
    """The classes of `SnapKV | TurboQuant`, which Python makes a union of; anything else alone."""
    return press.__args__ if isinstance(press, UnionType) else (press,)


def check_arguments(press_class: Any, values: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Refuse arguments that a press class does not have.

    Args:
        press_class: one of ours; its `remedies` say what to give instead.
        values: the positional arguments.
        named: the others.

    Raises:
        InvalidInputError: there are too many arguments, or one has an unknown name.
    """
    parameters = list(inspect.signature(press_class.__init__).parameters.values())[1:]
    kinds = {parameter.kind for parameter in parameters}
    names = [parameter.name for parameter in parameters]
    unknown = next((name for name in named if name not in names), None)
    if unknown is not None and inspect.Parameter.VAR_KEYWORD not in kinds:
        remedy = press_class.remedies.get(unknown, "").format(press=press_class.__name__)
        remedy = remedy or did_you_mean(unknown, names) or f"its arguments are {', '.join(names)}"
        raise InvalidInputError(f"{press_class.__name__} has no argument {unknown!r}; {remedy}")
    if len(values) > len(names) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        given = ", ".join(one.__name__ if isinstance(one, type) else short_repr(one) for one in values)
        remedy = f"its arguments are {', '.join(names)}"
        if all(map(is_press, values)):
            remedy = f"write Compose([{given}])"
        raise InvalidInputError(f"{press_class.__name__}({given}) has {len(values)} arguments; {remedy}")


def check_kinds(press: Any) -> None:
    """Refuse fields of another kind than they are declared with, int, float or bool, and counts below 0 or 1.

    None passes. The window of a kernel has to be odd, so that each token is in the middle of one.

    Raises:
        InvalidInputError: names the press, the field and the value.
    """
    for field in fields(press):
        value: Any = getattr(press, field.name) if field.init and field.type in _KINDS else None
        if value is None:
            continue
        kind, words = _KINDS[field.type]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InvalidInputError(f"{type(press).__name__}: {field.name} is {value!r}; give {words}")
        if kind is not Integral or field.name == "seed":
            continue
        count: Any = value
        least = int(field.name in _AT_LEAST_ONE)
        if count < least or (field.name == "kernel_size" and count % 2 == 0):
            wanted = "an odd whole number" if field.name == "kernel_size" else words
            raise InvalidInputError(
                f"{type(press).__name__}: {field.name} is {value!r}; give {wanted}, {least} or more"
            )


@runtime_checkable
class ScoresTokens(Protocol):
    """A press that scores tokens, whether or not it evicts by these scores alone, as a `ScorerPress` does."""

    def score(self, *states: Any) -> torch.Tensor:
        """[B, Hkv, T] scores of the tokens of a prefill."""


def inner_press(owner: object, press: Any, kind: type = ScorerPress) -> Any:
    """The press inside another, of the given kind; a class means its defaults.

    Raises:
        InvalidInputError: the press does not score tokens.
    """
    press = press() if isinstance(press, type) and issubclass(press, kind) else press
    if not isinstance(press, kind):
        raise InvalidInputError(
            f"{type(owner).__name__}: press is {short_repr(press)}; give one that scores tokens, such as "
            "SnapKV(0.5)"
        )
    return press
