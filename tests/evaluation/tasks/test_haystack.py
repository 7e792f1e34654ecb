"""Needles are planted where they should be, and the default model finds each one."""

import hashlib
import random
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from quantpress.errors import InvalidInputError
from quantpress.evaluation.tasks.haystack import (
    ANSWER_PREFIX,
    CITIES,
    Needle,
    book_text,
    is_right,
    needle_question,
    plant,
    random_needles,
)

BOOK_SHA256 = "2e44edaa4946d64ad541c68e0224f5d672f43bf3ce2a8a0b0637ad5e02fc6eb3"
SEPARATOR = "#" * 20
ANSWER_TOKENS = 7  # a space, five digits, a full stop


class WordTokenizer:
    """A token a word."""

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        return list(range(len(text.split())))


class Reader:
    """Greedy answers of the default model: a context read into an uncompressed cache, then its question."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    @torch.inference_mode()
    def answer(self, context: str, needle: Needle) -> str:
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": context + SEPARATOR}], add_generation_prompt=True, tokenize=False
        )
        before, after = str(chat).split(SEPARATOR)
        cache = DynamicCache()
        self.model.model(input_ids=torch.tensor([self._tokens(before)]), past_key_values=cache)
        fed, said = self._tokens(needle_question(needle.city) + after + ANSWER_PREFIX), list[int]()
        while len(said) < ANSWER_TOKENS:
            output = self.model(input_ids=torch.tensor([fed]), past_key_values=cache, logits_to_keep=1)
            fed = [int(output.logits[0, -1].argmax())]
            said += fed
        return str(self.tokenizer.decode(said))

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture
def reader(default_model: PreTrainedModel, default_tokenizer: PreTrainedTokenizerBase) -> Reader:
    return Reader(default_model, default_tokenizer)


def test_a_needle_is_found(reader: Reader) -> None:
    """At a depth that differs from run to run."""
    needle = random.choice(random_needles(5))
    answer = reader.answer(plant(book_text(), [needle], reader.tokenizer, 1024), needle)
    assert is_right(answer, needle), (needle, answer)


def test_without_its_sentence_the_number_is_not_known(reader: Reader) -> None:
    asked, planted = random_needles(2)
    context = plant(book_text(), [planted], reader.tokenizer, 512)
    assert not is_right(reader.answer(context, asked), asked)


@pytest.mark.parametrize("tokens", [150, 1024, 4096])
@pytest.mark.parametrize("count", [1, 5])
def test_the_context_has_as_many_tokens_as_asked_for(
    tokens: int, count: int, default_tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    needles = random_needles(count, seed)
    context = plant(book_text(), needles, default_tokenizer, tokens)
    assert tokens - 12 <= len(default_tokenizer.encode(context, add_special_tokens=False)) <= tokens
    assert all(context.count(needle.sentence) == 1 for needle in needles)


def test_nothing_but_the_needles_is_added() -> None:
    needles = random_needles(7)
    context = plant(book_text(), needles, WordTokenizer(), 2000)
    for needle in needles:
        context = context.replace(f" {needle.sentence}", "")
    assert book_text().startswith(context)


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_needle_lies_at_its_depth_after_a_sentence(depth: float) -> None:
    needle = Needle("Oslo", 12345, depth)
    context = plant(book_text(), [needle], WordTokenizer(), 3000)
    before, after = context.split(needle.sentence)
    assert abs(len(before) / (len(before) + len(after)) - depth) < 0.02
    assert not before.strip() or before.rstrip().rstrip("\"')_")[-1] in ".!?"
    assert not before.rstrip().endswith(("Mr.", "Mrs."))
    assert not after or after[0].isspace()


@pytest.mark.parametrize("title", ["Mr.", "Mrs.", "Dr.", "St.", "J."])
def test_a_title_does_not_end_a_sentence(title: str) -> None:
    text = f"One two three. Then {title} Bennet came in and sat by the fire. " + "Four five six. " * 9
    contexts = [plant(text, [Needle("Oslo", 1, depth / 50)], WordTokenizer(), 30) for depth in range(51)]
    assert not any(f"{title} The special" in context for context in contexts)
    assert len(set(contexts)) > 3


def test_needles_at_one_place_stand_in_order() -> None:
    needles = [Needle("Oslo", 11111, 0.0), Needle("Kyoto", 22222, 0.0)]
    context = plant("Once upon a time.", needles, WordTokenizer(), 20)
    assert context == f"{needles[0].sentence} {needles[1].sentence} Once upon a time."


def test_needles_depend_on_the_seed_alone() -> None:
    assert random_needles(20, seed=3) == random_needles(20, seed=3)
    assert random_needles(20, seed=3) != random_needles(20, seed=4)
    state = random.getstate()
    random_needles(5)
    assert random.getstate() == state


def test_needles_are_five_digits_of_different_cities_over_the_whole_depth() -> None:
    needles = random_needles(10, seed=1)
    assert len({needle.city for needle in needles}) == len({needle.number for needle in needles}) == 10
    assert all(10000 <= needle.number <= 99999 for needle in needles)
    assert [needle.depth for needle in needles] == pytest.approx([0.05 + 0.1 * index for index in range(10)])


def test_first_needles_are_the_same_on_every_machine() -> None:
    needles = [(needle.city, needle.number) for needle in random_needles(2, seed=0)]
    assert needles == [("Dublin", 15306), ("Santiago", 43936)]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" 12345.", True),
        (" 12,345", True),
        ("the number 12345, not 99999", True),
        ("99999, not 12345", False),
        (" 123456", False),
        (" 1234", False),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_the_first_number_decides(text: str, right: bool) -> None:
    assert is_right(text, Needle("Oslo", 12345, 0.5)) is right


def test_the_book_is_whole() -> None:
    book = book_text()
    assert book.startswith("PRIDE AND PREJUDICE")
    assert hashlib.sha256(book.encode()).hexdigest() == BOOK_SHA256
    assert book_text(100) == book[:100]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Needle("Oslo", 12345, 1.5), r"1\.5"),
        (lambda: random_needles(0), "count=0"),
        (lambda: random_needles(len(CITIES) + 1), f"count={len(CITIES) + 1}"),
        (lambda: plant(book_text(), random_needles(2), WordTokenizer(), 15), "tokens=15.* 16 tokens"),
        (lambda: plant("Too short. " * 9, random_needles(1), WordTokenizer(), 99), "tokens=99.* 26 tokens"),
    ],
    ids=["depth", "no needle", "too many", "no room", "short text"],
)
def test_wrong_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make()
