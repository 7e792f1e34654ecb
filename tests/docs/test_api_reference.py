"""The API reference holds every public name, as its docstring describes it."""

import importlib.util
import inspect
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
    for name in loaded:
        sys.modules.pop(name, None)


def test_every_public_name_is_there_once(
    docs: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = docs("api_reference")
    monkeypatch.setattr(writer, "FOLDER", tmp_path / "api")
    writer.write()
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "api").glob("*.md")}
    assert pages.keys() == {*writer.PACKAGES, "README"}
    headings = re.findall(r"^## (\w+)$", "\n".join(pages.values()), re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert {*quantpress.__all__, *presses.__all__} <= set(headings)
    assert str(inspect.getdoc(cache_memory)).splitlines()[0] in pages["quantpress"]


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
    assert docs("api_reference").markdown(DOCSTRING) == MARKDOWN
