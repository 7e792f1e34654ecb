"""The `|` between presses: `SnapKV(0.5) | TurboQuant(4)` is `Compose([SnapKV(0.5), TurboQuant(4)])`."""

from typing import TYPE_CHECKING, Any

from kvpress import BasePress

if TYPE_CHECKING:
    from quantpress.presses.compose import Compose


class Pipeable:
    """Adds `|` to a press. The other side may be any press, or a press class."""

    def __or__(self, other: Any) -> "Compose":
        return _compose(self, other) if _is_press(other) else NotImplemented

    def __ror__(self, other: Any) -> "Compose":
        return _compose(other, self) if _is_press(other) else NotImplemented


def _is_press(press: Any) -> bool:
    return isinstance(press, BasePress) or (isinstance(press, type) and issubclass(press, BasePress))


def _compose(*presses: Any) -> "Compose":
    from quantpress.presses.compose import Compose

    return Compose(presses)
