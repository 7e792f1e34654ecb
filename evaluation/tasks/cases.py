"""A case: one question about one context, and what its answer is worth.

>>> score("They are 12,345 and 999.", ("12345", "67890"), "recall")
0.5
>>> score("in want of a wife", ("in want of a good wife",), "words")
0.8333...
"""

import bisect
import difflib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from quantpress.errors import InvalidInputError
from quantpress.evaluation.tasks.haystack import book_text

SCORINGS = ("recall", "words")
CHAT_TOKENS = 64  # room for what the chat form adds to a context
_CHARACTERS = 6  # of a token, more than prose has
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


@dataclass(frozen=True)
class Case:
    """One question about one context.

    Args:
        task: what kind it is.
        name: unique in a run.
        context: what is read under a press.
        question: asked afterwards; presses do not see it.
        answer_prefix: how the answer begins.
        references: what a right answer holds.
        scoring: see `score`.
        answer_tokens: most tokens of the answer.
        tokens: of the context, chat form included, about.
        depth: of a single needle, 0.0 to 1.0; else None.
    """

    task: str
    name: str
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    scoring: str
    answer_tokens: int
    tokens: int
    depth: float | None = None


def score(answer: str, references: Sequence[str], scoring: str) -> float:
    """What an answer is worth, 0.0 to 1.0.

    "recall" is the part of the references that stand in the answer as whole words, in any case, with 12,345
    for 12345. "words" is the part of the first reference's words that the answer has, in this order.

    Raises:
        InvalidInputError: another scoring, or no reference.

    Source: "recall" is the string match of RULER, arXiv 2404.06654.
    """
    if scoring not in SCORINGS or not references:
        raise InvalidInputError(f"scoring {scoring!r} of {len(references)} references; one of {SCORINGS}")
    said = _words(answer)
    if scoring == "recall":
        return sum(_words(reference)[0] in said for reference in references) / len(references)
    wanted = _words(references[0])
    matcher = difflib.SequenceMatcher(None, wanted, said, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / len(wanted)


def prose(chance: random.Random, tokens: int) -> str:
    """The book from a random paragraph on, with more than `tokens` tokens where the book is long enough."""
    book, starts = _book(), _paragraphs()
    room = max(0, len(book) - tokens * _CHARACTERS)
    return book[chance.choice(starts[: bisect.bisect_right(starts, room)]) :]


@cache
def _book() -> str:
    return book_text()


@cache
def _paragraphs() -> tuple[int, ...]:
    """Where the book's paragraphs begin."""
    return (0, *(found.end() for found in re.finditer(r"\n\n+", _book())))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", _THOUSANDS.sub("", text).lower())
