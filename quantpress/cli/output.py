"""How a command shows what it found: one JSON document, or a table; everything else goes to stderr."""

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.progress import track
from rich.table import Table

FILE_WIDTH = 120  # columns of a table that is not shown in a terminal

_ERRORS = Console(stderr=True)

Item = TypeVar("Item")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


class Outcome(ABC):
    """What a command returns, a dataclass."""

    @property
    def exit_status(self) -> int:
        """Exit status of the process: 0, 1 when a bound failed, 2 when something was refused."""
        return 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """What people see; a string is printed as it is, whatever the width."""


def with_json(work: Callable[..., Outcome]) -> Callable[..., None]:
    """Turn the function of a command into the one that typer calls.

    Args:
        work: takes the options of the command and returns what it found.

    Returns:
        A function with one option more, `--json`, which shows the outcome and exits with its status.
    """

    @wraps(work)
    def command(json: bool, **options: Any) -> None:
        raise typer.Exit(perform(work, json, options))

    signature = inspect.signature(work)
    option = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json)
    parameters = [*signature.parameters.values(), option]
    command.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__ = {**work.__annotations__, "json": Json, "return": None}
    return command


def perform(work: Callable[..., Outcome], json: bool, options: dict[str, Any]) -> int:
    """Run a command and show its outcome.

    Args:
        work: the function of the command.
        json: print JSON; what libraries print meanwhile goes to stderr, so that stdout holds nothing else.
        options: keyword arguments of `work`.

    Returns:
        The exit status.
    """
    if json:
        with redirect_stdout(sys.stderr):
            outcome = work(**options)
        Console(soft_wrap=True).print_json(data=outcome.as_dict())
    else:
        outcome = work(**options)
        _show(outcome.__rich__())
    return outcome.exit_status


def _show(shown: RenderableType) -> None:
    if isinstance(shown, str):
        Console(soft_wrap=True).print(shown, markup=False, highlight=False)
        return
    console = Console(markup=False)  # "quantpress[kvpress]" in a cell is text
    (console if console.is_terminal else Console(width=FILE_WIDTH, markup=False)).print(shown)


def new_table(title: str, columns: Sequence[str], words: Sequence[str], caption: str | None = None) -> Table:
    """An empty table that fits into 80 columns: cells of words are folded, figures stay whole.

    Args:
        title: stands above it.
        columns: names of the columns, of which two may be the same.
        words: names of the columns that hold words; all others hold figures.
        caption: stands below it.
    """
    narrow: dict[str, Any] = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    table = Table(title=title, caption=caption, caption_justify="left", **narrow)
    for name in columns:
        is_words = name in words
        table.add_column(name, justify="left" if is_words else "right", no_wrap=not is_words, overflow="fold")
    return table


def one_below_the_other(press: str) -> str:
    """The presses of a composition on a line each, for a narrow column."""
    return press.replace(" | ", "\n| ")


def progress(items: Iterable[Item], what: str, total: int | None) -> Iterable[Item]:
    """The items, with a progress bar on stderr, in a terminal only; `total` is None where it is unknown."""
    return track(items, what, total=total, console=_ERRORS, transient=True)


def note(line: str) -> None:
    """Print a line on stderr, above a bar that is drawn there."""
    _ERRORS.print(line, markup=False, highlight=False, soft_wrap=True)
