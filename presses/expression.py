"""A press written as text, as on a command line: `SnapKV(0.5) | TurboQuant(bits=3)`.

The text has Python's syntax. It is parsed with `ast` and never run: it may contain names of presses,
arguments that are plain values, presses or lists, and `|`. Nothing else is accepted.

`my_module:MyPress(0.5)` names a press of one's own: the module is imported and `MyPress` is called. So such a
text can run any code that Python can import; take it from nobody whose code you would not run.
"""

import ast
import inspect
import re
import sys
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

from quantpress import presses
from quantpress.errors import InvalidInputError, QuantPressError, did_you_mean
from quantpress.presses.base_press import BasePress
from quantpress.presses.presets import COMPOSITIONS, PRESETS

MAX_LENGTH = 2000
_MODULE = re.compile(r"""'[^']*'|"[^"]*"|(?<![\w.])([^\W\d][\w.]*):(?=[^\W\d])""")
"""Text in quotes, or the module in front of a colon and a name."""


def parse_press(text: str) -> BasePress | None:
    """Make the press that a text describes.

    Args:
        text: one press, several joined by `|`, or "none". Names are those of `quantpress.presses`, and
            kvpress's own (`SnapKVPress`), whose defaults evict nothing. A name alone means its defaults.
            `TurboQuant.preset("small")` and `Compose.preset("question_aware")` work too.
            `my_module:MyPress(0.5)` is the class, or a function that makes a press, of a module that can be
            imported or lies in the current folder.

    Returns:
        A press; `Compose` for several; None for "none".

    Raises:
        InvalidInputError: the text is not such an expression, or names an unknown press or argument, or a
            module that cannot be imported.
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
        # A colon is no operator of Python; @ is one, and binds more tightly than |.
        source = _MODULE.sub(lambda found: f"{found[1]}@" if found[1] else found[0], text.strip())
        tree = ast.parse(source, mode="eval")
        made = [_press(node, text) for node in _joined(tree.body)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, QuantPressError):
            raise
        raise InvalidInputError(
            f"{text!r} is no press; write something like 'SnapKV(0.5) | TurboQuant(bits=3)'"
        ) from error
    return made[0] if len(made) == 1 else presses.Compose(made)


def _joined(node: ast.expr) -> list[ast.expr]:
    """The terms of `a | b | c`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_joined(node.left), *_joined(node.right)]
    return [node]


def _press(node: ast.expr, text: str, module: str = "") -> BasePress:
    """The press that a term describes; `module` stands in front of the term."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and not module:
        return _press(node.right, text, ast.unparse(node.left))
    if isinstance(node, ast.Name):
        return _made(_maker(node, text, module), [], {}, text)
    if isinstance(node, ast.Call):
        make = _maker(node.func, text, module)
        if any(keyword.arg is None for keyword in node.keywords):
            raise InvalidInputError(f"** has no meaning in {text!r}; write the arguments out")
        named = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
        return _made(make, [_value(argument, text) for argument in node.args], named, text)
    raise InvalidInputError(
        f"{ast.unparse(node)!r} in {text!r} is no press; write a name, or name(arguments)"
    )


def _maker(node: ast.expr, text: str, module: str) -> Any:
    if isinstance(node, ast.Name):
        return _own(module, node.id, text) if module else _class(node.id, text)
    by_name: dict[str, Any] = {"Compose.preset": presses.Compose, "TurboQuant.preset": presses.TurboQuant}
    if ast.unparse(node) in by_name and not module:
        return by_name[ast.unparse(node)].preset
    raise InvalidInputError(f"{ast.unparse(node)!r} in {text!r} is no press; write its name alone")


def _value(node: ast.expr, text: str) -> Any:
    """An argument: a plain value, a press, or a list of them."""
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, text) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return presses.Compose([_press(one, text) for one in _joined(node)])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return _press(node, text)
    if isinstance(node, ast.Call) or (isinstance(node, ast.Name) and _find(node.id)):
        return _press(node, text)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise InvalidInputError(
            f"{ast.unparse(node)!r} in {text!r} is neither a plain value nor a press"
        ) from error


def _made(make: Any, values: list[Any], named: dict[str, Any], text: str) -> BasePress:
    try:
        press = make(*values, **named)
    except QuantPressError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise InvalidInputError(f"{make.__name__} in {text!r} {_why_not_made(make, named, error)}") from error
    if not isinstance(press, BasePress):
        raise InvalidInputError(f"{make.__name__} in {text!r} made {press!r}, which is no press")
    return press


def _why_not_made(make: Any, named: dict[str, Any], error: Exception) -> str:
    kinds = {name: one.kind for name, one in inspect.signature(make).parameters.items()}
    names = [name for name, kind in kinds.items() if kind.name not in ("VAR_POSITIONAL", "VAR_KEYWORD")]
    unknown = next((name for name in named if name not in names), None)
    if unknown is None or inspect.Parameter.VAR_KEYWORD in kinds.values():
        return f"cannot be made so ({error}); its arguments are {', '.join(names)}"
    return f"has no argument {unknown!r}; {_nearest(unknown, names)}"


def _own(module: str, name: str, text: str) -> Any:
    """What a module calls `name`: the class of a press, or a function."""
    home = _imported(module, text)
    found = getattr(home, name, None)
    if found is None:
        there = [key for key, one in vars(home).items() if _may_make(one) and one.__module__ == home.__name__]
        hint = _nearest(name, there) if there else "it has no press"
        raise InvalidInputError(f"the module {module} in {text!r} has no {name!r}; {hint}")
    if not _may_make(found):
        raise InvalidInputError(
            f"{module}:{name} in {text!r} is no press; name a press class, or a function that makes one"
        )
    return found


def _may_make(one: Any) -> bool:
    """Whether it is a press class, or a function written in Python."""
    is_class = isinstance(one, type)
    return issubclass(one, BasePress) if is_class else inspect.isfunction(one) or inspect.ismethod(one)


def _imported(module: str, text: str) -> Any:
    """Import a module; where the import system finds none, the current folder may have it."""
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    invalidate_caches()  # the file may be newer than the last look at its folder
    try:
        return import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise InvalidInputError(
                f"there is no module {module!r} for {text!r}; go to the folder of {module.split('.')[0]}.py "
                f"(this is {folder}), or name that folder in PYTHONPATH"
            ) from error
        reason = f"{type(error).__name__}: {error}"
        raise InvalidInputError(f"the module {module} in {text!r} cannot be imported ({reason})") from error
    finally:
        if added:
            sys.path.remove(folder)


def _class(name: str, text: str) -> type[BasePress]:
    press = _find(name)
    if press is None:
        names = [*presses.__all__, *_of_kvpress()]  # type: ignore[attr-defined]
        preset = next(iter(get_close_matches(name, [*PRESETS, *COMPOSITIONS], n=1, cutoff=0.8)), None)
        owner = "TurboQuant" if preset in PRESETS else "Compose"
        hint = _nearest(name, names) if preset is None else f"for the preset write {owner}.preset({preset!r})"
        raise InvalidInputError(f"there is no press {name!r} in {text!r}; {hint}")
    return press


def _nearest(name: str, names: list[str]) -> str:
    return did_you_mean(name, names) or f"there are {', '.join(sorted(names))}"


def _find(name: str) -> type[BasePress] | None:
    """The press class of a name that a text may use; None for an unknown name."""
    if name in presses.__all__:  # type: ignore[attr-defined]
        ours: type[BasePress] = getattr(presses, name)
        return ours
    return _of_kvpress().get(name) if name.endswith("Press") else None


@lru_cache(maxsize=1)
def _of_kvpress() -> dict[str, Any]:
    """kvpress's own classes by name; none where it is not installed."""
    try:
        kvpress = import_module("kvpress")
    except ImportError:
        return {}
    found = {name: getattr(kvpress, name) for name in kvpress.__all__}
    return {name: one for name, one in found.items() if isinstance(one, type) and issubclass(one, BasePress)}
