"""What a press is made of: a composition is treated like the presses inside it.

kvpress's pipeline asks `isinstance(press, KeyRerotationPress)` and the like, which a press inside a
composition does not answer. Here the question goes to every member.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from kvpress import BasePress, RestoreKVPress

from quantpress.errors import InvalidInputError
from quantpress.presses.composition import decodes, rerotates
from quantpress.presses.expression import parse_press

if TYPE_CHECKING:
    from quantpress.presses import Compose

PressOrBits: TypeAlias = BasePress | type[BasePress] | Sequence[Any] | str | float | None


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


def chosen_press(press: PressOrBits, options: dict[str, Any]) -> "Compose":
    """What a user gives `enable`, as a composition.

    Raises:
        CompositionError: presses that do not go together.
        InvalidInputError: something else, or options beside a press.
    """
    from quantpress.presses import Compose, TurboQuant
    from quantpress.presses.presets import PRESETS

    if press is None:
        return Compose([TurboQuant(**options)])
    if isinstance(press, str) and press in PRESETS:
        return Compose([TurboQuant.preset(press, **options)])
    if isinstance(press, (int, float)) and not isinstance(press, bool):
        return Compose([TurboQuant(bits=press, **options)])
    if options:
        raise InvalidInputError(
            f"{', '.join(options)} given beside {press!r}; set them on the press itself, TurboQuant(...)"
        )
    chosen = as_press(press)
    return chosen if isinstance(chosen, Compose) else Compose([chosen])


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
