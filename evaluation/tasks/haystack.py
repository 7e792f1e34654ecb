"""Needles in a haystack: facts planted in a public-domain novel, and the questions that ask for them.

>>> needle = Needle("Lisbon", 48213, depth=0.5)
>>> needle.sentence
'The special magic number for Lisbon is: 48213.'
>>> is_right(" 48213.", needle), is_right("The number is 48214", needle)
(True, False)
"""

import bisect
import lzma
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantpress.errors import InvalidInputError

BOOK = Path(__file__).parent / "data" / "pride_and_prejudice.txt.xz"
ANSWER_PREFIX = "The special magic number is:"
CITIES = (
    *("Lisbon", "Oslo", "Nairobi", "Toronto", "Kyoto", "Prague", "Havana", "Cairo", "Sydney", "Madrid"),
    *("Vienna", "Jakarta", "Dublin", "Santiago", "Helsinki", "Mumbai", "Athens", "Seattle", "Warsaw", "Rome"),
)
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?][\"')_]*(?=\s)")
NUMBER = re.compile(r"\d+(?:,\d{3})*")
LONGEST_TOKEN = 16  # characters; tokens of prose average 4 to 6


class Tokenizer(Protocol):
    """What we need of a tokenizer; every tokenizer of transformers has it."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        """The token ids of `text`; with `verbose`, a text longer than the model reads gives a warning."""


class Planted(Protocol):
    """What can be planted: a sentence and its depth."""

    @property
    def sentence(self) -> str: ...
    @property
    def depth(self) -> float: ...


@dataclass(frozen=True)
class Needle:
    """One fact: a city's number, planted at `depth` of the context (0.0 its start, 1.0 its end).

    Raises:
        InvalidInputError: the depth is outside 0 to 1.
    """

    city: str
    number: int
    depth: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.depth <= 1.0:
            raise InvalidInputError(f"a needle's depth is from 0.0 (start) to 1.0 (end), got {self.depth}.")

    @property
    def sentence(self) -> str:
        """The sentence that is planted."""
        return f"The special magic number for {self.city} is: {self.number}."


def book_text(max_characters: int | None = None) -> str:
    """The first `max_characters` of Pride and Prejudice (1813, public domain); None for all 685,000."""
    return lzma.decompress(BOOK.read_bytes()).decode("utf-8")[:max_characters]


def book_piece(tokenizer: Tokenizer, tokens: int) -> str:
    """The beginning of the book with `tokens` tokens, give or take a word.

    Raises:
        InvalidInputError: the book has fewer tokens.
    """
    return plant(book_text(), [], tokenizer, tokens)


def random_needles(count: int, seed: int = 0) -> list[Needle]:
    """`count` needles with different cities and random 5-digit numbers, spread evenly over the context.

    The i-th lies at depth (i + 1/2) / count. The same seed gives the same needles on every machine.

    Raises:
        InvalidInputError: `count` is below 1 or above the number of cities.
    """
    if not 1 <= count <= len(CITIES):
        raise InvalidInputError(f"there are cities for 1 to {len(CITIES)} needles, got count={count}.")
    chance = random.Random(seed)
    cities = chance.sample(CITIES, count)
    return [
        Needle(city, chance.randint(10000, 99999), (index + 0.5) / count) for index, city in enumerate(cities)
    ]


def plant(text: str, needles: Sequence[Planted], tokenizer: Tokenizer, tokens: int) -> str:
    """The longest beginning of `text` that has at most `tokens` tokens with the needles planted in it.

    Args:
        text: running prose, which is cut at the end of a word.
        needles: facts, each put at the end of the sentence nearest to its depth.
        tokenizer: counts the tokens, without special ones.
        tokens: most tokens of the result, which has this many, give or take a word.

    Raises:
        InvalidInputError: the needles do not fit into `tokens`, or `text` has fewer tokens than asked for.
    """
    reach = text[: tokens * LONGEST_TOKEN]
    word_ends = [match.end() for match in re.finditer(r"\S+", reach)]
    sentence_ends = [match.end() for match in SENTENCE_END.finditer(reach)]

    def planted(words: int) -> str:
        end = word_ends[words - 1] if words else 0
        ends = [0, *sentence_ends[: bisect.bisect_right(sentence_ends, end)]]
        pieces, done = [], 0
        for needle in sorted(needles, key=lambda needle: needle.depth):
            here = min(ends, key=lambda offset: abs(offset - needle.depth * end))
            pieces += [text[done:here], f" {needle.sentence}" if here else f"{needle.sentence} "]
            done = here
        return "".join([*pieces, text[done:end]])

    def count(words: int) -> int:
        return len(tokenizer.encode(planted(words), add_special_tokens=False, verbose=False))

    words = bisect.bisect_right(range(len(word_ends) + 1), tokens, key=count) - 1
    if words < 0:
        raise InvalidInputError(f"tokens={tokens}: the needles alone have {count(0)} tokens.")
    if words == len(word_ends) and count(words) < tokens:
        raise InvalidInputError(f"tokens={tokens}: text and needles have {count(words)} tokens.")
    while count(words) > tokens:  # a needle that moved to another sentence may have added a token
        words -= 1
    return planted(words)


def needle_question(city: str) -> str:
    """The question for a city's number, to follow the context; the answer begins with `ANSWER_PREFIX`."""
    return f"\n\nWhat is the special magic number for {city} mentioned in the provided text?"


def is_right(answer: str, needle: Needle) -> bool:
    """Whether the first number in `answer` is the needle's (12,345 counts as 12345)."""
    first = NUMBER.search(answer)
    return first is not None and int(first[0].replace(",", "")) == needle.number
