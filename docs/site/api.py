"""The pages of the API: one for each package, with a directive of mkdocstrings for each public name.

A name is described once, on the page of the first package in `PACKAGES` that has it. kvpress's own classes
are named only.
"""

import inspect
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGES = {
    "quantpress": ["quantpress"],
    "presses": ["quantpress.presses"],
    "pipelines": ["quantpress.pipelines"],
    "evaluation": ["quantpress.evaluation"],
    "cache": ["quantpress.cache"],
    "codecs": ["quantpress.codecs"],
    "kernels": ["quantpress.kernels.attend", "quantpress.kernels.encode", "quantpress.kernels.dequantize"],
    "quantization": ["quantpress.quantization"],
}
ROOT = Path(__file__).parents[2]
ALSO = {"presses": " or from `quantpress`"}
COPY = ROOT / "build" / "api"  # where mkdocs.yml has mkdocstrings look for the sources


def on_startup(**_: object) -> None:
    """Copy the sources, with an `__init__.py` in every folder: without one mkdocstrings sees no package."""
    shutil.rmtree(COPY, ignore_errors=True)
    without = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(ROOT / "quantpress", COPY / "quantpress", ignore=without)
    for folder in {path.parent for path in COPY.rglob("*.py")}:
        (folder / "__init__.py").touch()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for page, text in pages().items():
        files.append(File.generated(config, f"docs/api/{page}.md", content=text))
    return files


def pages() -> dict[str, str]:
    """The Markdown of each page, by its name."""
    seen: set[str] = set()
    return {page: "\n\n".join(_page(page, modules, seen)) + "\n" for page, modules in PACKAGES.items()}


def _page(page: str, modules: list[str], seen: set[str]) -> Iterator[str]:
    yield f"# {'quantpress' if page == 'quantpress' else f'quantpress.{page}'}"
    for module in map(import_module, modules):
        yield str(inspect.getdoc(module)).split("\n\n")[0]
        yield f"Import these names from `{module.__name__}`{ALSO.get(page, '')}."
        found = {name: getattr(module, name) for name in module.__all__ if name not in seen}
        seen.update(found)
        for name in sorted(found, key=lambda name: (_is_error(found[name]), name.lower())):
            yield _entry(module.__name__, name, found[name])


def _entry(module: str, name: str, found: Any) -> str:
    home = getattr(found, "__module__", module) if callable(found) else module
    if home.startswith("kvpress"):
        return f"## {name}\n\n`{found.__name__}` of kvpress, whose documentation describes it."
    return f"::: {home if home.startswith('quantpress') else module}.{name}"


def _is_error(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, BaseException)
