"""How a command shows what it found: one JSON document, or a table; everything else goes to stderr."""

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from typing import Any, Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.progress import track

FILE_WIDTH = 120  # columns of a table that is not shown in a terminal

Item = TypeVar("Item")


class Outcome(Protocol):
    """What a command returns. `exit_status` is 0, 1 when a bound failed, 2 when something was refused."""

    @property
    def exit_status(self) -> int:
        """Of the process."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

    def __rich__(self) -> RenderableType: ...


def console() -> Console:
    """For people; wide enough for a table where there is no terminal."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=FILE_WIDTH)


def print_json(data: Any) -> None:
    """One JSON document on the standard output."""
    Console(soft_wrap=True).print_json(data=data)


def perform(command: Any, json: bool, options: dict[str, Any]) -> int:
    """Run a command and show what it returns.

    Args:
        command: takes the options and returns an `Outcome`.
        json: print JSON; what libraries print meanwhile goes to stderr, so that stdout holds nothing else.
        options: of the command.

    Returns:
        The exit status.
    """
    if json:
        with redirect_stdout(sys.stderr):
            outcome: Outcome = command(**options)
        print_json(outcome.as_dict())
    else:
        outcome = command(**options)
        console().print(outcome)
    return outcome.exit_status


def progress(items: Iterable[Item], what: str, total: int) -> Iterable[Item]:
    """The items, with a bar on stderr while they are worked on; in a terminal only."""
    return track(items, what, total=total, console=Console(stderr=True), transient=True)
