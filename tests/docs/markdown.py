"""The code blocks and links of the project's Markdown pages, and how a block is run.

A block runs as it is printed, behind the blocks before it on its page, with the names of `shared_names`.
What a fence says behind its language changes that:

    ```python            runs
    ```python gpu        runs where there is a CUDA device
    ```python other      another project's code: it only has to be Python
    ```python sketch     names or modules that are not there: it only has to be Python
    ```bash              each command: see `tests/docs/commands.py`
    ```                  output, or a picture: nothing to run
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from markdown_it import MarkdownIt
from transformers import DynamicCache

from tests.pipelines.words import ours, text, word_tokenizer
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
CONTEXT_TOKENS = 900
LANGUAGES = frozenset({"", "python", "bash", "console", "pycon"})
MARKS = frozenset({"", "gpu", "other", "sketch"})


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page: its path below the root.
        section: the heading of second order above it; empty before the first.
        line: of its first line of code, counted from 1.
        language: the first word of the fence.
        mark: the second, if any.
        code: what it holds.
    """

    page: str
    section: str
    line: int
    language: str
    mark: str
    code: str

    def compiled(self) -> Any:
        """Code whose tracebacks name the line of the page; 500 new tokens are 50 here."""
        code = self.code.replace("max_new_tokens=500", "max_new_tokens=50")
        return compile("\n" * (self.line - 1) + code, self.page, "exec")


def pages() -> list[str]:
    """Every page that people read; the diaries (changelog and log) have no code to run."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    names = {path.relative_to(ROOT).as_posix() for path in found}
    return sorted(names - {"CHANGELOG.md"})


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, section = [], ""
    tokens = _tokens(page)
    for index, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            section = tokens[index + 1].content
        if token.type == "fence":
            language, mark, *_ = [*token.info.split(), "", ""]
            found.append(Block(page, section, token.map[0] + 2, language, mark, token.content))
    return found


def links(page: str) -> Iterator[str]:
    """Where a page's links and images point."""
    for token in _tokens(page):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield str(target)


def anchors(page: str) -> set[str]:
    """The names that GitHub gives the headings of a page."""
    tokens = _tokens(page)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _tokens(page: str) -> list[Any]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def shared_names() -> dict[str, Any]:
    """The names that pages may use without having made them, as docs/README.md says."""
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    keys, values, queries = torch.randn(3, 1, 2, 300, 128)
    inputs = tokenizer(text(CONTEXT_TOKENS), return_tensors="pt", return_token_type_ids=False)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "pipe": ours(max_new_tokens=4),
        "text": text(CONTEXT_TOKENS),
        "context": text(CONTEXT_TOKENS),
        "question": "w1 w2",
        "inputs": inputs,
        "context_ids": inputs.input_ids,
        "question_ids": tokenizer("w3 w4 w5", return_tensors="pt").input_ids,
        "cache": DynamicCache(),
        "keys": keys,
        "values": values,
        "queries": queries,
    }


def why_not_run(block: Block) -> str | None:
    """Why a python block cannot be run on this machine; None when it can."""
    if block.mark == "gpu":
        return None if torch.cuda.is_available() else "needs a CUDA device"
    if block.mark in ("other", "sketch"):
        return "not meant to be run as it is"
    return None


def run(some: list[Block], names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run python blocks one behind the other; the names after each that ran."""
    after = []
    for block in some:
        if block.language != "python":
            continue
        ast.parse(block.code)
        if why_not_run(block) is None:
            with torch.no_grad():
                exec(block.compiled(), names)
            after.append(dict(names))
    assert "forward" not in vars(names["model"]), "the model is left as it was"
    return after
