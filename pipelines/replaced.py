"""A method of one model replaced for a while, and put back exactly."""

from collections.abc import Callable
from typing import Any

from torch import nn

from quantpress.errors import InvalidInputError


class Replaced:
    """What stands in an object's `__dict__` in the place of one of its methods.

    It is called with the method that it replaces and what that was called with. Copies and pickles of the
    object get a replacement of their own, bound to the copy, because nothing here is a closure.

    Args:
        owner: the object, mostly a model.
        name: of the method.
        run: called with (the method, *args, **kwargs).

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> twice = Replaced(layer, "forward", lambda forward, x: 2 * forward(x))
        >>> twice.undo()
        >>> "forward" in vars(layer)
        False
    """

    def __init__(self, owner: nn.Module, name: str, run: Callable[..., Any]) -> None:
        self.owner, self.name, self.run = owner, name, run
        self.own = name in vars(owner)
        self.original = getattr(owner, name)
        self.__wrapped__ = self.original  # `inspect.signature` asks for it
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.original, *args, **kwargs)

    def check(self) -> None:
        """Refuse to undo what something else was put on top of.

        Raises:
            InvalidInputError: the method was replaced once more since.
        """
        if vars(self.owner).get(self.name) is not self:
            raise InvalidInputError(
                f"{type(self.owner).__name__}.{self.name} was replaced again since; undo that first, for "
                "example by leaving the `with` block that did it"
            )

    def undo(self) -> None:
        """Put the method back; see `check`."""
        self.check()
        if self.own:
            vars(self.owner)[self.name] = self.original
        else:
            del vars(self.owner)[self.name]
