"""Cases: one question about one context each, and how an answer is scored.

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
CHAT_TOKENS = 64  # left free for what the chat form adds to a context
_CHARACTERS = 6  # per token, more than prose has
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")


@dataclass(frozen=True)
class Case:
    """One question about one context.

    Args:
        task: name of the task.
        name: name of the case, unique in a run.
        context: text that is read under a press.
        question: asked afterwards; presses do not see it, unless a run is question-aware.
        answer_prefix: how the answer begins.
        references: what a right answer contains.
        scoring: "recall" or "words"; see `score`.
        answer_tokens: most tokens of the answer.
        tokens: approximate length of the context, chat form included.
        depth: depth of a single needle, 0.0 to 1.0; otherwise None.
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

    "recall" is the share of the references that the answer contains as whole words, in upper or lower case;
    12,345 counts as 12345. "words" is the share of the first reference's words that the answer has, in the
    same order.

    Raises:
        InvalidInputError: `scoring` is unknown, or there is no reference.

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
    """The book from a random paragraph on; more than `tokens` tokens where the book is long enough."""
    book, starts = _book(), _paragraphs()
    latest = max(0, len(book) - tokens * _CHARACTERS)
    return book[chance.choice(starts[: bisect.bisect_right(starts, latest)]) :]


@cache
def _book() -> str:
    return book_text()


@cache
def _paragraphs() -> tuple[int, ...]:
    """Where the book's paragraphs begin."""
    return (0, *(found.end() for found in re.finditer(r"\n\n+", _book())))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", _THOUSANDS.sub("", text).lower())
