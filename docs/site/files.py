"""The pages of the site: the repository's Markdown under its own paths, so that links work here and there.

Scripts, notebooks and the license become pages too, which show their text.
"""

import json
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
COPIED = ("*.md", "docs/*.md", "docs/*.png", "docs/results/*.json", "examples/*.md", "benchmarks/*.md")
SHOWN = ("examples/*.py", "examples/*.ipynb", "LICENSE")
LINK = re.compile(r"(\]\([^)#\s]*(?:\.py|\.ipynb|\bLICENSE))\)")
MARK = re.compile(r"^```python (gpu|other|sketch)$", re.MULTILINE)
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
TITLES = {"gpu": ' title="needs a CUDA device"', "other": ' title="another project\'s code"', "sketch": ""}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the repository's files in the place of those of docs/."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in _found(COPIED):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    for path in _found(SHOWN):
        name = f"{path.relative_to(ROOT).as_posix()}.md"
        files.append(File.generated(config, name, content=shown(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Let a page read as on GitHub; links lead to what is shown, and the marks of blocks are in words."""
    markdown = LINK.sub(r"\1.md)", ROW.sub(lambda found: _row(found[0]), markdown))
    return MARK.sub(lambda found: f"```python{TITLES[found[1]]}", markdown)


def _row(row: str) -> str:
    """A row of a table: here code takes no backslash before |, and a comparison would begin a tag."""
    parts = row.split("`")
    parts[1::2] = [code.replace(r"\|", "|") for code in parts[1::2]]
    parts[::2] = [text.replace("<", "&lt;") for text in parts[::2]]
    return "`".join(parts)


def shown(path: Path) -> str:
    """A page with the text of a file, or with the cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells)
    return f"# {path.name}\n\n{_block(text, 'python' if path.suffix == '.py' else '')}\n"


def _cell(kind: str, source: str) -> str:
    return source if kind == "markdown" else _block(source, "python")


def _block(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def _found(patterns: tuple[str, ...]) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))
