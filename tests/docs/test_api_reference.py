"""docs/api/ holds every public name and is what the docstrings say now."""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import quantpress
from quantpress import presses
from quantpress.cache import cache_memory

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def docs() -> Iterator[Callable[[str], ModuleType]]:
    """Loads a script of docs/, which is no package."""
    loaded = []

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, DOCS / "writers" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded.append(name)
        return module

    before = list(sys.path)
    sys.path.insert(0, str(DOCS / "writers"))
    yield load
    sys.path[:] = before
    for name in {*loaded, "docstrings"}:
        sys.modules.pop(name, None)


def test_pages_are_not_stale(docs: Callable[[str], ModuleType]) -> None:
    stale = docs("api_reference").stale()
    assert not stale, f"docs/api: {', '.join(stale)} say something else; run python docs/build.py"


def test_a_changed_docstring_is_noticed(
    docs: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_memory, "__doc__", "Something else.")
    assert docs("api_reference").stale() == ["quantpress.md"]


def test_every_public_name_is_there_once() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
    headings = re.findall(r"^## (\w+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert {*quantpress.__all__, *presses.__all__} <= set(headings)


def test_every_public_name_has_a_docstring() -> None:
    for name in {*quantpress.__all__, *presses.__all__}:
        found = getattr(quantpress, name)
        if found.__module__.startswith("quantpress"):
            assert found.__doc__ and not found.__doc__.startswith(f"{name}("), name


DOCSTRING = """Does 2**b * c, and **means** `2**b`.

Args:
    first, second: numbers,
        any two.
    **options: more.

Returns (of a call):
    Their sum:

        first + second

Raises:
    ValueError: a * b.

Example:
    >>> # f(1, 2)
    >>> # f(3)

>>> 1 + 1
2
"""
MARKDOWN = r"""Does 2\*\*b \* c, and **means** `2**b`.

**Arguments**

- `first`, `second`: numbers, any two.
- `**options`: more.

**Returns (of a call)**

Their sum:

```
first + second
```

**Raises**

- `ValueError`: a \* b.

**Example**

```python sketch
f(1, 2)
f(3)
```

```pycon
>>> 1 + 1
2
```"""


def test_docstrings_become_markdown(docs: Callable[[str], ModuleType]) -> None:
    assert docs("docstrings").markdown(DOCSTRING) == MARKDOWN
