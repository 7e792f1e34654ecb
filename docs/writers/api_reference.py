"""Writes docs/api/: the public names with their signatures and docstrings, one page a package.

A name is described once, on the page of the first package in `PACKAGES` that has it. Inherited methods are
left out, and so are annotations, since docstrings say shapes and dtypes. Classes of other packages get a name
and a signature only.
"""

import inspect
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from docstrings import markdown

FOLDER = Path(__file__).parents[1] / "api"

PACKAGES = {
    "quantpress": ["quantpress"],
    "presses": ["quantpress.presses"],
    "pipelines": ["quantpress.pipelines"],
    "cache": ["quantpress.cache"],
    "kernels": ["quantpress.kernels.attend", "quantpress.kernels.encode", "quantpress.kernels.dequantize"],
    "codecs": ["quantpress.codecs"],
    "quantization": ["quantpress.quantization"],
}
WIDTH = 100
INDEX = """# API reference

Written from the docstrings by `python docs/build.py`. Every name of `quantpress` and `quantpress.presses` can
be imported from `quantpress` itself; the others from the package in the heading of their page.

| page | names |
|---|---|
"""


def reference() -> dict[str, str]:
    """The text of each page below docs/api/, by file name."""
    pages, seen, rows = {}, set(), []
    for page, modules in PACKAGES.items():
        entries, names = [], []
        for module in map(import_module, modules):
            for name in sorted(module.__all__, key=str.lower):
                found = getattr(module, name)
                if name in seen:
                    continue
                seen.add(name)
                names.append(f"`{name}`")
                entries.append("\n\n".join(_entry(name, found)))
        title = "quantpress" if page == "quantpress" else f"quantpress.{page}"
        about = _about(modules[0]) if len(modules) == 1 else ""
        pages[f"{page}.md"] = "\n\n".join(filter(None, [f"# {title}", about, *entries])) + "\n"
        rows.append(f"| [{page}.md]({page}.md) | {', '.join(names)} |")
    return {"README.md": INDEX + "\n".join(rows) + "\n", **pages}


def _about(module: str) -> str:
    """The docstring of a package without its list of files."""
    paragraphs = (inspect.getdoc(import_module(module)) or "").split("\n\n")
    return markdown("\n\n".join(one for one in paragraphs if ".py " not in one))


def _entry(name: str, found: Any) -> Iterator[str]:
    """Yield the parts of the description of a name."""
    yield f"## {name}"
    if not callable(found) or not hasattr(found, "__module__"):
        yield f"`{name} = {found!r}`"
        return
    if not _is_class_of(found, BaseException):
        yield _code(f"{name}{_signature(found)}")
    if not found.__module__.startswith("quantpress"):
        package = found.__module__.split(".")[0]
        yield f"`{found.__name__}` of {package}, whose documentation describes it."
        return
    yield markdown(inspect.getdoc(found) or "")
    if inspect.isclass(found):
        for member, kind, value in _members(found):
            heading = f"{name}.{member}"
            yield f"### {heading}"
            if kind != "property":
                yield _code(f"{heading}{_signature(value)}")
            yield ("" if kind == "method" else f"*{kind}.* ") + markdown(inspect.getdoc(value) or "")


def _is_class_of(found: Any, base: type) -> bool:
    """Whether `found` is a subclass of `base`."""
    return inspect.isclass(found) and issubclass(found, base)


def _members(cls: type) -> Iterator[tuple[str, str, Any]]:
    """Yield public methods and properties that a class documents: name, kind, and the documented object."""
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        kind, inner = "method", value
        if isinstance(value, (classmethod, staticmethod)):
            kind, inner = type(value).__name__.replace("method", " method"), getattr(cls, name)
        elif isinstance(value, property):
            kind = "property"
        elif not inspect.isfunction(value):
            continue
        own = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if own.__doc__:
            yield name, kind, inner


def _signature(found: Any) -> str:
    """Parameters with their defaults, on one line or one a line."""
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        return "(...)"
    parts, starred = [], False
    made = {field.name: field.default_factory for field in fields(found)} if is_dataclass(found) else {}
    for parameter in parameters:
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        if default == "=..." and inspect.isclass(made.get(parameter.name)):
            default = f"={made[parameter.name].__name__}()"
        parts.append(f"{stars}{parameter.name}{default}")
    line = f"({', '.join(parts)})"
    return line if len(line) < WIDTH - 20 else "(\n" + "".join(f"    {part},\n" for part in parts) + ")"


def _default(value: Any) -> str:
    text = getattr(value, "__name__", None) or repr(value)
    return "..." if "<" in text else text  # a value without a literal form


def _code(text: str) -> str:
    return f"```\n{text}\n```"


def write() -> None:
    """Write every page, and remove those of packages that no longer exist."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    for name, text in reference().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
