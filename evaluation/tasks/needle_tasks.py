"""Tasks whose facts are planted in a book: needles, chains of variables, and the book itself word for word.

Their forms are those of RULER (arXiv 2404.06654); texts and numbers are made from a seed.
"""

import random
from dataclasses import dataclass
from itertools import pairwise

from quantpress.errors import InvalidInputError
from quantpress.evaluation.tasks.cases import CHAT_TOKENS, Case, prose
from quantpress.evaluation.tasks.haystack import (
    ANSWER_PREFIX,
    CITIES,
    SENTENCE_END,
    Needle,
    Tokenizer,
    needle_question,
    plant,
)

KEYS = 5  # needles of multi_key and multi_query
ASKED = 3  # values of multi_value, cities that multi_query asks for
HOPS = 3  # variables of a chain after the first
NUMBER_TOKENS = 8  # tokens of a 5-digit number and what surrounds it
QUOTED_WORDS, CUE_WORDS = 12, 6


@dataclass(frozen=True)
class Fact:
    """A sentence to plant, and its depth."""

    sentence: str
    depth: float


def needle(tokenizer: Tokenizer, tokens: int, seed: int, depth: float | None = None) -> Case:
    """One number in a book, at a random depth unless one is given."""
    chance = _chance("needle", tokens, seed, depth)
    depth = chance.random() if depth is None else depth
    planted = Needle(chance.choice(CITIES), _number(chance), depth)
    return Case(
        "needle",
        f"needle {tokens} {depth:.2f} {seed}",
        plant(prose(chance, tokens), [planted], tokenizer, tokens - CHAT_TOKENS),
        needle_question(planted.city),
        ANSWER_PREFIX,
        (str(planted.number),),
        "recall",
        NUMBER_TOKENS,
        tokens,
        depth,
    )


def multi_key(tokenizer: Tokenizer, tokens: int, seed: int) -> Case:
    """Numbers of several cities, one of which is asked for."""
    chance = _chance("multi_key", tokens, seed)
    needles = [Needle(city, _number(chance), chance.random()) for city in chance.sample(CITIES, KEYS)]
    asked = chance.choice(needles)
    return Case(
        "multi_key",
        f"multi_key {tokens} {seed}",
        plant(prose(chance, tokens), needles, tokenizer, tokens - CHAT_TOKENS),
        needle_question(asked.city),
        ANSWER_PREFIX,
        (str(asked.number),),
        "recall",
        NUMBER_TOKENS,
        tokens,
    )


def multi_value(tokenizer: Tokenizer, tokens: int, seed: int) -> Case:
    """Several numbers of one city, all asked for."""
    chance = _chance("multi_value", tokens, seed)
    city, numbers = chance.choice(CITIES), [_number(chance) for _ in range(ASKED)]
    facts = [
        Fact(f"One of the special magic numbers for {city} is: {number}.", chance.random())
        for number in numbers
    ]
    return Case(
        "multi_value",
        f"multi_value {tokens} {seed}",
        plant(prose(chance, tokens), facts, tokenizer, tokens - CHAT_TOKENS),
        f"\n\nWhat are all the special magic numbers for {city} mentioned in the provided text?",
        f"The special magic numbers for {city} mentioned in the provided text are:",
        tuple(map(str, numbers)),
        "recall",
        NUMBER_TOKENS * (ASKED + 1),
        tokens,
    )


def multi_query(tokenizer: Tokenizer, tokens: int, seed: int) -> Case:
    """Numbers of several cities, several of which are asked for at once."""
    chance = _chance("multi_query", tokens, seed)
    needles = [Needle(city, _number(chance), chance.random()) for city in chance.sample(CITIES, KEYS)]
    asked = chance.sample(needles, ASKED)
    cities = f"{', '.join(one.city for one in asked[:-1])} and {asked[-1].city}"
    return Case(
        "multi_query",
        f"multi_query {tokens} {seed}",
        plant(prose(chance, tokens), needles, tokenizer, tokens - CHAT_TOKENS),
        f"\n\nWhat are the special magic numbers for {cities} mentioned in the provided text?",
        f"The special magic numbers for {cities} are:",
        tuple(str(one.number) for one in asked),
        "recall",
        NUMBER_TOKENS * (ASKED + 1),
        tokens,
    )


def variable_tracking(tokenizer: Tokenizer, tokens: int, seed: int) -> Case:
    """A number that is passed from variable to variable; all variables that have it are asked for."""
    chance = _chance("variable_tracking", tokens, seed)
    names = chance.sample([f"{a}{b}" for a in "ABCDEFGHJK" for b in "LMNPQRSTVW"], HOPS + 1)
    number, depths = _number(chance), sorted(chance.random() for _ in names)
    sentences = [f"VAR {names[0]} = {number}."]
    sentences += [f"VAR {new} = VAR {old}." for old, new in pairwise(names)]
    facts = [Fact(sentence, depth) for sentence, depth in zip(sentences, depths, strict=True)]
    return Case(
        "variable_tracking",
        f"variable_tracking {tokens} {seed}",
        plant(prose(chance, tokens), facts, tokenizer, tokens - CHAT_TOKENS),
        f"\n\nWhich variables mentioned in the provided text have the value {number}?",
        f"{len(names)} variables have the value {number}:",
        tuple(names),
        "recall",
        NUMBER_TOKENS * len(names),
        tokens,
    )


def quote(tokenizer: Tokenizer, tokens: int, seed: int) -> Case:
    """The rest of a sentence of the book, word for word.

    Raises:
        InvalidInputError: no sentence of the context is long enough and begins unlike all others.
    """
    chance = _chance("quote", tokens, seed)
    context = plant(prose(chance, tokens), [], tokenizer, tokens - CHAT_TOKENS)
    ends = [0, *(found.end() for found in SENTENCE_END.finditer(context))]
    sentences = [context[a:b].split() for a, b in pairwise(ends)]
    cues = [" ".join(words[:CUE_WORDS]) for words in sentences]
    flat = " ".join(context.split())
    usable = [
        words
        for words, cue in zip(sentences, cues, strict=True)
        if len(words) >= CUE_WORDS + QUOTED_WORDS and flat.count(cue) == 1
    ]
    if not usable:
        raise InvalidInputError(f"{tokens} tokens hold no sentence to quote; ask for a longer context")
    words = chance.choice(usable)
    cue = " ".join(words[:CUE_WORDS])
    return Case(
        "quote",
        f"quote {tokens} {seed}",
        context,
        f'\n\nQuote the sentence of the provided text that begins with "{cue}", word for word.',
        cue,
        (" ".join(words[CUE_WORDS : CUE_WORDS + QUOTED_WORDS]),),
        "words",
        2 * QUOTED_WORDS,
        tokens,
    )


def _number(chance: random.Random) -> int:
    return chance.randint(10000, 99999)


def _chance(*key: object) -> random.Random:
    return random.Random("/".join(map(str, key)))
