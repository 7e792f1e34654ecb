"""Writes docs/api/: the public names with their signatures and docstrings, one page a package.

A name is described once, on the page of the first package in `PACKAGES` that has it. Inherited methods are
left out, and so are annotations, since docstrings say shapes and dtypes. Classes of other packages get a name
and a signature only.
"""

import inspect
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

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


SECTION = re.compile(r"(Args|Attributes|Examples?|Raises|Returns|Yields)( \(.*\))?:$")
LISTS = frozenset({"Args", "Attributes", "Raises"})
WORDS = {"Args": "Arguments"}
KEPT = re.compile(r"(`[^`]*`|(?<!\S)\*\*[A-Za-z][^*]*\*\*)")
ITEM = re.compile(r"(\*{0,2}[\w., *]+|`[^`]+`): (.*)$")


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


def markdown(text: str) -> str:
    """Turn a docstring into Markdown.

    Sections become a bold word and a list. Sessions at the prompt (`>>>`) and indented lines become blocks of
    code.

    Args:
        text: the docstring as `inspect.getdoc` returns it.

    Returns:
        Paragraphs, separated by empty lines.
    """
    return "\n\n".join(part for block in _blocks(text) for part in block)


def _blocks(text: str) -> Iterator[list[str]]:
    lines = text.splitlines()
    while lines:
        found = SECTION.match(lines[0])
        if found:
            lines.pop(0)
            inner = _take(lines, lambda line: not line or line.startswith("    "))
            word = WORDS.get(found[1], found[1]) + (found[2] or "")
            inner = [line[4:] for line in inner]
            yield [f"**{word}**", *(_list(inner) if found[1] in LISTS else _parts(inner))]
        else:
            yield _parts(_take(lines, lambda line: not SECTION.match(line)))


def _take(lines: list[str], wanted: Callable[[str], object]) -> list[str]:
    """Remove lines from the front as long as they are wanted."""
    taken: list[str] = []
    while lines and wanted(lines[0]):
        taken.append(lines.pop(0))
    return taken


def _list(lines: list[str]) -> list[str]:
    items: list[list[str]] = []
    for line in filter(None, lines):
        if not line.startswith(" ") or not items:
            items.append([])
        items[-1].append(line.strip())
    return ["\n".join(_item(" ".join(item)) for item in items)]


def _item(text: str) -> str:
    found = ITEM.match(text)
    if found is None:
        return f"- {escaped(text)}"
    names = ", ".join(f"`{name.strip('`')}`" for name in found[1].split(", "))
    return f"- {names}: {escaped(found[2])}"


def _parts(lines: list[str]) -> list[str]:
    """Paragraphs, sessions and indented code."""
    parts: list[str] = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if paragraph.startswith(">>> # "):
            sketch = "\n".join(line.removeprefix(">>> # ") for line in paragraph.splitlines())
            parts.append(f"```python sketch\n{sketch}\n```")
        elif paragraph.startswith(">>> "):
            parts.append(f"```pycon\n{paragraph}\n```")
        elif paragraph.startswith("    "):
            inner = "\n".join(line[4:] for line in paragraph.splitlines())
            parts.append(f"```\n{inner}\n```")
        elif re.search(r"^\S+\.py\b.*  ", paragraph):
            parts.append(f"```\n{paragraph}\n```")
        elif paragraph:
            parts.append(_lines(paragraph))
    return parts


def _lines(paragraph: str) -> str:
    """A paragraph; what is indented in it is a block of code."""
    out: list[str] = []
    code = False
    for line in paragraph.splitlines():
        inside = line.startswith("  ") and not re.match(r"\s+[-*] ", line)
        if inside != code:
            out.append("```\n" if code else "\n```")
            code = inside
        out.append(line if inside else escaped(line))
    return "\n".join([*out, "```"] if code else out)


def escaped(text: str) -> str:
    """Escape stars, except in `code` and in **bold words**."""
    parts = KEPT.split(text)
    return "".join(part if index % 2 else part.replace("*", r"\*") for index, part in enumerate(parts))
