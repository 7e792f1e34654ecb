"""What a press is made of: a composition is treated like the presses inside it.

kvpress's pipeline asks `isinstance(press, KeyRerotationPress)` and the like, which a press inside a
composition does not answer. Here the question goes to every member.
"""

from collections.abc import Iterator
from typing import Any

from kvpress import BasePress, RestoreKVPress

from quantpress.errors import InvalidInputError
from quantpress.presses.composition import decodes, rerotates
from quantpress.presses.expression import parse_press


def as_press(press: Any) -> BasePress | None:
    """What a user gives as press=: a press, its class, a list of both (`Compose`), or text (`parse_press`).

    Raises:
        CompositionError: presses that do not go together.
        InvalidInputError: something else.
    """
    if press is None or isinstance(press, BasePress):
        return press
    from quantpress.presses import Compose

    if isinstance(press, str):
        return parse_press(press)
    if isinstance(press, type) and issubclass(press, BasePress):
        return Compose([press])
    if isinstance(press, (list, tuple)):
        return Compose(list(press))
    raise InvalidInputError(
        f"press={press!r} is no press; give a kvpress press, a press class, a list of them, or text"
    )


def members(press: BasePress | None) -> Iterator[BasePress]:
    """The press itself, then everything inside it (`Compose`, kvpress's `ComposedPress`), in order."""
    if press is not None:
        yield press
        for inner in getattr(press, "presses", ()):
            yield from members(inner)


def contains(press: BasePress | None, kinds: type | tuple[type, ...]) -> bool:
    """Whether the press, or one inside its composition, is an instance of `kinds`.

    Example:
        >>> from kvpress import ComposedPress, KnormPress, SnapKVPress
        >>> contains(ComposedPress([SnapKVPress(), KnormPress()]), KnormPress), contains(None, KnormPress)
        (True, False)
    """
    return any(isinstance(member, kinds) for member in members(press))


def decode_time_presses(press: BasePress | None) -> list[BasePress]:
    """The members that also act while the answer is generated."""
    return [member for member in members(press) if decodes(member)]


def renumbers_positions(press: BasePress | None) -> bool:
    """Whether kept tokens get new positions without gaps: the next position is then the number kept."""
    return contains(press, RestoreKVPress) or any(rerotates(member) for member in members(press))
