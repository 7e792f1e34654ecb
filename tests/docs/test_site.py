"""What the site adds to the pages: `make docs` builds it, and follows every link."""

import html
import inspect
import os
import re
import runpy
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt

import quantpress
from quantpress import evaluation, presses
from tests.docs.markdown import ROOT, pages

pytest.importorskip("mkdocs")
from markdown import Markdown
from mkdocs.config import load_config


@pytest.fixture(scope="module")
def site() -> Iterator[Any]:
    """The settings of the site, with its hooks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NO_MKDOCS_2_WARNING", "1")
        yield load_config(str(ROOT / "mkdocs.yml"))


def hook(site: Any, name: str) -> ModuleType:
    return site.hooks[os.path.join("docs", "site", f"{name}.py")]


UNSEEN = re.compile(r'<span class="filename">.*?</span>|<a class="headerlink".*?</a>|<!--.*?-->', re.DOTALL)


def words(text: str) -> str:
    """What a reader of HTML sees, without spaces."""
    return re.sub(r"\s", "", html.unescape(re.sub(r"<[^>]*>", "", UNSEEN.sub("", text))))


@pytest.mark.parametrize("page", [*pages(), "CHANGELOG.md"])
def test_a_page_reads_as_on_github(page: str, site: Any) -> None:
    """Also its lists, which the two parsers take for lists under different rules."""
    text = (ROOT / page).read_text(encoding="utf-8")
    github = MarkdownIt("commonmark").enable("table").render(text)
    converter = Markdown(extensions=site.markdown_extensions, extension_configs=site.mdx_configs)
    here = converter.convert(hook(site, "files").on_page_markdown(text))
    assert words(here) == words(github)
    for tag in ("<li", "<table", "<pre", "<h2"):
        assert here.count(tag) == github.count(tag), tag


def test_every_public_name_is_described_once(site: Any) -> None:
    found = "\n".join(hook(site, "api").pages().values())
    names = re.findall(r"^(?:::: .*\.|## )(\w+)$", found, re.MULTILINE)
    assert len(names) == len(set(names))
    assert {*quantpress.__all__, *presses.__all__, *evaluation.__all__} <= {*names}
    for home, name in re.findall(r"^::: (.*)\.(\w+)$", found, re.MULTILINE):
        one = getattr(import_module(home), name)
        assert not callable(one) or not hasattr(one, "__module__") or inspect.getdoc(one), name


def test_examples_are_blocks_of_code() -> None:
    examples = runpy.run_path(str(ROOT / "docs" / "site" / "docstrings.py"))["examples"]
    said = "Says.\n\nExample:\n    >>> # with f(1):\n    >>> #     g()\n\n>>> 1 + 1\n2\n\nMore."
    shown = "Says.\n\nExamples:\n    ```python\n    with f(1):\n        g()\n    ```\n\n"
    assert examples(said) == shown + "```pycon\n>>> 1 + 1\n2\n```\n\nMore."
