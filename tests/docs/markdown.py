"""The code blocks of the project's Markdown pages, found and run by Sybil.

A block runs as it is printed, behind the blocks before it on its page, with the names of `shared_names`.
docs/README.md says what the words of a fence mean.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from sybil.region import Lexeme
from transformers import DynamicCache

from tests.docs import commands
from tests.pipelines.words import ours, text, word_tokenizer
from tests.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
CONTEXT_TOKENS = 900
FENCES = RawFencedCodeBlockLexer(re.compile(r"(?P<language>\S*) *(?P<mark>[^\n]*)\n"))
MARKS = frozenset({"", "gpu", "other", "sketch"})


def pages() -> list[str]:
    """Every page that people read; the diaries (changelog and log) have no code to run."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    names = {path.relative_to(ROOT).as_posix() for path in found}
    return sorted(names - {"CHANGELOG.md"})


def blocks(path: Path, **names: Any) -> list[Example]:
    """The fenced blocks of a page, in order; those in Python share `names`, or else `shared_names`."""
    document = Document.parse(str(path), _parse)
    found = list(document)
    if any(fence(block)[0] == "python" for block in found):
        document.namespace.update(names or shared_names())
    return found


def fence(block: Example) -> tuple[str, str]:
    """The language of a block and the mark behind it, either of which may be empty."""
    return block.region.lexemes["language"], block.region.lexemes["mark"]


def run(some: list[Example]) -> list[dict[str, Any]]:
    """Run blocks one behind the other; the names after each in Python that ran."""
    after = []
    for block in some:
        block.evaluate()
        if fence(block)[0] == "python" and why_not_run(block) is None:
            after.append(dict(block.namespace))
    for names in after[-1:]:
        assert "forward" not in vars(names["model"]), "the model is left as it was"
    return after


def why_not_run(block: Example) -> str | None:
    """Why a block in Python cannot be run on this machine; None when it can."""
    _, mark = fence(block)
    if mark == "gpu":
        return None if torch.cuda.is_available() else "needs a CUDA device"
    return "not meant to be run as it is" if mark else None


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


def _parse(document: Document) -> Iterator[Region]:
    for region in FENCES(document):
        code = region.lexemes["source"]
        shorter = code.replace("max_new_tokens=500", "max_new_tokens=20")
        shorter = shorter.replace("max_new_tokens=200", "max_new_tokens=80")  # the first eviction is after 64
        region.parsed = Lexeme(shorter, code.offset, code.line_offset)
        region.evaluator = EVALUATORS.get(region.lexemes["language"], _unknown)
        yield region


def _python(block: Example) -> None:
    ast.parse(block.parsed)
    assert fence(block)[1] in MARKS, f"{block.path}:{block.line}: a fence is marked {sorted(MARKS)}"
    if why_not_run(block) is None:
        with torch.no_grad():
            PythonEvaluator()(block)


def _bash(block: Example) -> None:
    for words in commands.commands(block.parsed):
        commands.check(words)


def _shown(block: Example) -> None:
    """Output, or a picture."""


def _unknown(block: Example) -> None:
    raise AssertionError(
        f"{block.path}:{block.line}: write {sorted(filter(None, EVALUATORS))}, or nothing for output"
    )


EVALUATORS = {"python": _python, "bash": _bash, "": _shown, "console": _shown, "pycon": _shown}
