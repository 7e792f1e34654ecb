"""A press written as text, as on a command line: `SnapKV(0.5) | TurboQuant(bits=3)`.

The text has Python's syntax. It is parsed with `ast` and never run: it may contain names of presses,
arguments that are plain values, presses or lists, and `|`. Nothing else is accepted.
"""

import ast
from dataclasses import fields
from functools import lru_cache
from typing import Any

import kvpress
from kvpress import BasePress

from quantpress import presses
from quantpress.errors import InvalidInputError, QuantPressError, did_you_mean

MAX_LENGTH = 2000


def parse_press(text: str) -> BasePress | None:
    """Make the press that a text describes.

    Args:
        text: one press, several joined by `|`, or "none". Names are those of `quantpress.presses`, and
            kvpress's own (`SnapKVPress`), whose defaults evict nothing. A name alone means its defaults.
            `TurboQuant.preset("small")` works too.

    Returns:
        A press; `Compose` for several; None for "none".

    Raises:
        InvalidInputError: the text is not such an expression, or names an unknown press or argument.
        CompositionError: the presses do not work together.

    >>> parse_press("SnapKV(0.3) | TurboQuant(bits=3)")
    Compose(SnapKV(0.3) | TurboQuant(3))
    >>> parse_press("SnapKVV(0.3)")
    Traceback (most recent call last):
    quantpress.errors.InvalidInputError: there is no press 'SnapKVV' in 'SnapKVV(0.3)'; did you mean 'SnapKV'?
    """
    if len(text) > MAX_LENGTH:
        raise InvalidInputError(f"a press of {len(text)} characters; write it in at most {MAX_LENGTH}")
    if text.strip().lower() == "none":
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        made = [_press(node, text) for node in _joined(tree.body)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, QuantPressError):
            raise
        raise InvalidInputError(
            f"{text!r} is no press; write something like 'SnapKV(0.5) | TurboQuant(bits=3)'"
        ) from error
    return made[0] if len(made) == 1 else _known()["Compose"](made)


def _joined(node: ast.expr) -> list[ast.expr]:
    """The terms of `a | b | c`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_joined(node.left), *_joined(node.right)]
    return [node]


def _press(node: ast.expr, text: str) -> BasePress:
    if isinstance(node, ast.Name):
        return _made(_class(node.id, text), [], {}, text)
    if isinstance(node, ast.Call):
        make = _maker(node.func, text)
        if any(keyword.arg is None for keyword in node.keywords):
            raise InvalidInputError(f"** has no meaning in {text!r}; write the arguments out")
        named = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
        return _made(make, [_value(argument, text) for argument in node.args], named, text)
    raise InvalidInputError(
        f"{ast.unparse(node)!r} in {text!r} is no press; write a name, or name(arguments)"
    )


def _maker(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return _class(node.id, text)
    if ast.unparse(node) == "TurboQuant.preset":
        return _known()["TurboQuant"].preset
    raise InvalidInputError(f"{ast.unparse(node)!r} in {text!r} is no press; write its name alone")


def _value(node: ast.expr, text: str) -> Any:
    """An argument: a plain value, a press, or a list of them."""
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, text) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _known()["Compose"]([_press(one, text) for one in _joined(node)])
    if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and node.id in _known()):
        return _press(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise InvalidInputError(
            f"{ast.unparse(node)!r} in {text!r} is neither a plain value nor a press"
        ) from error


def _made(make: Any, values: list[Any], named: dict[str, Any], text: str) -> BasePress:
    try:
        press: BasePress = make(*values, **named)
    except QuantPressError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        names = [field.name for field in fields(make) if field.init] if isinstance(make, type) else []
        unknown = next((name for name in named if names and name not in names), None)
        hint = _nearest(unknown, names) if unknown else f"its arguments are {', '.join(names)}"
        what = f"has no argument {unknown!r}" if unknown else f"cannot be made so ({error})"
        raise InvalidInputError(f"{make.__name__} in {text!r} {what}; {hint}") from error
    return press


def _class(name: str, text: str) -> type[BasePress]:
    press: type[BasePress] | None = _known().get(name)
    if press is None:
        raise InvalidInputError(f"there is no press {name!r} in {text!r}; {_nearest(name, list(_known()))}")
    return press


def _nearest(name: str, names: list[str]) -> str:
    return did_you_mean(name, names) or f"there are {', '.join(sorted(names))}"


@lru_cache(maxsize=1)
def _known() -> dict[str, Any]:
    """Press classes by the names that a text may use."""
    theirs = {name: getattr(kvpress, name) for name in kvpress.__all__}
    classes = {
        name: one for name, one in theirs.items() if isinstance(one, type) and issubclass(one, BasePress)
    }
    names: list[str] = presses.__all__  # type: ignore[attr-defined]
    return {**classes, **{name: getattr(presses, name) for name in names}}
