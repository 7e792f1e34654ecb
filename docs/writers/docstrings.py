"""Turns docstrings in Google style into Markdown."""

import re
from collections.abc import Callable, Iterator

SECTION = re.compile(r"(Args|Attributes|Examples?|Raises|Returns|Yields)( \(.*\))?:$")
LISTS = frozenset({"Args", "Attributes", "Raises"})
WORDS = {"Args": "Arguments"}
KEPT = re.compile(r"(`[^`]*`|(?<!\S)\*\*[A-Za-z][^*]*\*\*)")
ITEM = re.compile(r"(\*{0,2}[\w., *]+|`[^`]+`): (.*)$")


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
