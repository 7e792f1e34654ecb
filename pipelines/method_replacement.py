"""A method of one object, replaced for a while and put back exactly."""

from collections.abc import Callable
from typing import Any

from torch import nn

from quantpress.errors import InvalidInputError


class MethodReplacement:
    """Stands in an object's `__dict__` in place of one of its methods, until `undo`.

    A call goes to `run`, with the method that was replaced and the arguments of the call. Copies and pickles
    of the object get a replacement of their own, bound to the copy, because no closure is involved.

    Args:
        owner: the object, usually a model.
        name: the name of the method.
        run: called with (the method, *args, **kwargs).

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> twice = MethodReplacement(layer, "forward", lambda forward, x: 2 * forward(x))
        >>> twice.undo()
        >>> "forward" in vars(layer)
        False
    """

    def __init__(self, owner: nn.Module, name: str, run: Callable[..., Any]) -> None:
        self.owner, self.name, self.run = owner, name, run
        self._in_dict = name in vars(owner)
        self.original = getattr(owner, name)
        self.__wrapped__ = self.original  # for `inspect.signature`
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.original, *args, **kwargs)

    def check(self) -> None:
        """Check that nothing has replaced the method again.

        Raises:
            InvalidInputError: the method was replaced again since, so that this replacement cannot be undone.
        """
        if vars(self.owner).get(self.name) is not self:
            raise InvalidInputError(
                f"{type(self.owner).__name__}.{self.name} was replaced again since; undo that first, for "
                "example by leaving the `with` block that did it"
            )

    def undo(self) -> None:
        """Put the original method back.

        Raises:
            InvalidInputError: the method was replaced again since.
        """
        self.check()
        if self._in_dict:
            vars(self.owner)[self.name] = self.original
        else:
            del vars(self.owner)[self.name]
