"""What mkdocstrings does not see by itself: examples in our form, and the arguments of presses."""

import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import Any

import griffe

SESSION = re.compile(r"^( *)>>> .*(?:\n *\S.*)*", re.MULTILINE)
PROMPTED = re.compile(r"^( *)(?:>>>|\.\.\.) # ?", re.MULTILINE)
KINDS = {kind: griffe.ParameterKind[kind.name.lower()] for kind in inspect._ParameterKind}


class Extension(griffe.Extension):
    """Completes what was loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Bring examples into the form that is recognized."""
        if obj.docstring:
            obj.docstring.value = examples(obj.docstring.value)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a press without `__init__` the arguments that its base class makes when it runs."""
        if cls.path.startswith("quantpress.presses.") and cls.docstring and not cls.decorators:
            found = getattr(import_module(cls.module.path), cls.name)
            if is_dataclass(found) and "__init__" not in cls.members:
                cls.set_member("__init__", griffe.Function("__init__", parameters=_parameters(found)))


def examples(docstring: str) -> str:
    """The docstring with its example under the heading that Griffe knows, and its sessions as blocks of code.

    A session of comments alone, since it needs a model, loses its prompts.
    """
    docstring = re.sub(r"^( *)Example:$", r"\1Examples:", docstring, flags=re.MULTILINE)
    return SESSION.sub(lambda found: _block(found[0], found[1]), docstring)


def _block(lines: str, indent: str) -> str:
    comments = all(PROMPTED.match(line) for line in lines.splitlines())
    code = PROMPTED.sub(r"\1", lines) if comments else lines
    return f"{indent}```{'python' if comments else 'pycon'}\n{code}\n{indent}```"


def _parameters(press: type) -> griffe.Parameters:
    made = {one.name: one.default_factory for one in fields(press)}
    shown = [griffe.Parameter("self")]
    for name, one in inspect.signature(press).parameters.items():
        if not name.startswith("_"):
            default = _default(one.default, made.get(name))
            shown.append(griffe.Parameter(name, kind=KINDS[one.kind], default=default))
    return griffe.Parameters(*shown)


def _default(value: Any, factory: Any) -> str | None:
    if factory not in (None, MISSING):
        return repr(factory())
    if value is inspect.Parameter.empty:
        return None
    return getattr(value, "__name__", None) or repr(value)
