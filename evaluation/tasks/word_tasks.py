"""Tasks that count the words of a list: the most common and the most frequent ones.

Their forms are those of RULER (arXiv 2404.06654); the words come from the book or are made up, from a seed.
"""

import bisect
import random
import re
import string
from collections.abc import Callable
from functools import cache

from quantpress.errors import InvalidInputError
from quantpress.evaluation.tasks.cases import CHAT_TOKENS, Case
from quantpress.evaluation.tasks.haystack import Tokenizer, book_text

COMMON = 5  # words to find in common_words
COMMON_SHARE = 0.5  # share of common words in the list
FREQUENT = 3  # words to find in frequent_words
ZIPF = 2.0  # exponent of the frequencies, as in RULER
WORD_TOKENS = 6  # tokens of a made-up word and what surrounds it


def common_words(tokenizer: Tokenizer, tokens: int, seed: int) -> Case:
    """A numbered list: half of it repeats five words, the other half are words that occur once.

    Raises:
        InvalidInputError: no list fits into `tokens`.
    """
    chance = random.Random(f"common_words/{tokens}/{seed}")
    vocabulary = _vocabulary()
    common = chance.sample(vocabulary, COMMON)
    others = chance.sample([word for word in vocabulary if word not in common], len(vocabulary) - COMMON)
    order = chance.random()

    def listed(count: int) -> str:
        often = [common[i % COMMON] for i in range(round(count * COMMON_SHARE))]
        once = [others[i % len(others)] for i in range(count - len(often))]
        words = often + once
        random.Random(order).shuffle(words)
        return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))

    return Case(
        "common_words",
        f"common_words {tokens} {seed}",
        _longest(listed, tokenizer, tokens - CHAT_TOKENS, 4 * COMMON),
        f"\n\nWhat are the {COMMON} most common words in the list above?",
        f"The {COMMON} most common words in the list are:",
        tuple(common),
        "recall",
        WORD_TOKENS * (COMMON + 1),
        tokens,
    )


def frequent_words(tokenizer: Tokenizer, tokens: int, seed: int) -> Case:
    """Made-up words, the k-th as frequent as k to the power -2.

    Raises:
        InvalidInputError: the words do not fit into `tokens`.
    """
    chance = random.Random(f"frequent_words/{tokens}/{seed}")
    words = list(dict.fromkeys("".join(chance.choices(string.ascii_lowercase, k=5)) for _ in range(60)))
    weights = [1 / rank**ZIPF for rank in range(1, len(words) + 1)]
    order = chance.random()

    def coded(count: int) -> str:
        total = sum(weights)
        times = [max(1, round(count * weight / total)) for weight in weights]
        text = [word for word, often in zip(words, times, strict=True) for _ in range(often)][:count]
        random.Random(order).shuffle(text)
        return " ".join(text)

    return Case(
        "frequent_words",
        f"frequent_words {tokens} {seed}",
        _longest(coded, tokenizer, tokens - CHAT_TOKENS, 20),
        f"\n\nWhat are the {FREQUENT} most frequent words in the coded text above?",
        f"The {FREQUENT} most frequent words are:",
        tuple(words[:FREQUENT]),
        "recall",
        WORD_TOKENS * (FREQUENT + 1),
        tokens,
    )


def _longest(make: Callable[[int], str], tokenizer: Tokenizer, tokens: int, least: int) -> str:
    """The text with the most words that has at most `tokens` tokens."""

    def count(words: int) -> int:
        return len(tokenizer.encode(make(words), add_special_tokens=False, verbose=False))

    words = bisect.bisect_right(range(tokens + 1), tokens, key=count) - 1
    while words >= least and count(words) > tokens:  # a longer list may have fewer tokens
        words -= 1
    if words < least:
        raise InvalidInputError(f"{tokens} tokens have no room for a list of {least} words; ask for more")
    return make(words)


@cache
def _vocabulary() -> list[str]:
    """Words of five to eight letters in the book, without names, in alphabetical order."""
    return sorted(set(re.findall(r"(?<= )[a-z]{5,8}(?=[ ,;])", book_text(200_000))))
