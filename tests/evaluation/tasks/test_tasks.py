"""Cases hold what they ask for, are the same on every machine, and scores are what they say."""

import random
import re
from collections import Counter

import pytest

from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import Arm, uncompressed
from quantpress.evaluation.tasks import needle_tasks, word_tasks
from quantpress.evaluation.tasks.cases import CHAT_TOKENS, prose, score
from quantpress.evaluation.tasks.task_runs import TASKS, ask, make_cases
from quantpress.presses import TurboQuant
from tests.pipelines.words import ours

TOKENS = 700
EVERY = {"needle": needle_tasks.needle, **TASKS}


class WordTokenizer:
    """A token a word."""

    def encode(self, text, *, add_special_tokens, verbose):
        return list(range(len(text.split())))


def case(task, seed=0, tokens=TOKENS):
    return EVERY[task](WordTokenizer(), tokens, seed)


@pytest.mark.parametrize("task", EVERY)
def test_a_seed_makes_one_case(task):
    state = random.getstate()
    assert case(task, 3) == case(task, 3)
    assert case(task, 3).context != case(task, 4).context
    assert case(task, 3).name != case(task, 4).name
    assert random.getstate() == state


@pytest.mark.parametrize("task", EVERY)
@pytest.mark.parametrize("tokens", [300, 2000])
def test_a_context_is_as_long_as_asked_for(task, tokens):
    found = len(case(task, tokens=tokens).context.split())
    assert tokens - CHAT_TOKENS - 20 <= found <= tokens - CHAT_TOKENS


@pytest.mark.parametrize("task", EVERY)
def test_the_answer_is_in_the_context_and_not_in_the_question(task):
    found = case(task)
    flat = " ".join(found.context.split())
    for reference in found.references:
        assert reference in flat
        assert reference not in found.question
        assert reference not in found.answer_prefix
    assert found.task == task
    assert score(" ".join(found.references), found.references, found.scoring) == 1
    assert score("I cannot say.", found.references, found.scoring) == 0


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_a_needle_lies_at_its_depth(depth):
    found = needle_tasks.needle(WordTokenizer(), 3000, 1, depth)
    assert found.depth == depth
    place = found.context.index("The special magic number") / len(found.context)
    assert place == pytest.approx(depth, abs=0.03)


def test_the_city_that_is_asked_for_has_the_number():
    for seed in range(5):
        found = case("multi_key", seed)
        city = re.search(r"number for (\w+) mentioned", found.question)[1]
        assert f"number for {city} is: {found.references[0]}." in found.context
        assert len(re.findall(r"special magic number for", found.context)) == needle_tasks.KEYS


def test_all_numbers_of_the_city_are_asked_for():
    found = case("multi_value")
    city = re.search(r"numbers for (\w+) mentioned", found.question)[1]
    assert set(re.findall(rf"numbers for {city} is: (\d+)", found.context)) == set(found.references)


def test_every_city_that_is_asked_for_counts():
    found = case("multi_query")
    planted = dict(re.findall(r"number for (\w+) is: (\d+)", found.context))
    asked = [city for city in planted if city in found.question]
    assert len(asked) == needle_tasks.ASKED
    assert {planted[city] for city in asked} == set(found.references)


def test_variables_are_those_that_the_chain_reaches():
    for seed in range(5):
        found = case("variable_tracking", seed)
        first, number = re.search(r"VAR (\w+) = (\d+)\.", found.context).groups()
        reached = {first}
        for new, old in re.findall(r"VAR (\w+) = VAR (\w+)\.", found.context):  # the chain is in order
            reached |= {new} if old in reached else set()
        assert reached == set(found.references)
        assert number in found.question


def test_common_words_are_the_most_common():
    found = case("common_words")
    counted = Counter(re.findall(r"[a-z]+", found.context)).most_common(word_tasks.COMMON + 1)
    assert {word for word, _ in counted[:-1]} == set(found.references)
    assert counted[-1][1] == 1 < counted[-2][1]


def test_frequent_words_are_the_most_frequent_and_follow_the_law():
    found = case("frequent_words", tokens=3000)
    counted = Counter(found.context.split()).most_common(4)
    assert [word for word, _ in counted[:3]] == list(found.references)
    for rank, (_, times) in enumerate(counted, 1):
        assert times == pytest.approx(counted[0][1] / rank**word_tasks.ZIPF, rel=0.1)


def test_a_quotation_goes_on_from_its_cue_and_begins_like_no_other():
    for seed in range(5):
        found = case("quote", seed)
        flat = " ".join(found.context.split())
        assert f"{found.answer_prefix} {found.references[0]}" in flat
        assert flat.count(found.answer_prefix) == 1


@pytest.mark.parametrize(
    ("answer", "references", "scoring", "worth"),
    [
        ("12,345 and 999", ("12345", "999"), "recall", 1.0),
        ("123456", ("12345",), "recall", 0.0),
        ("Widow.\nPROOF", ("widow", "proof", "dear", "shame"), "recall", 0.5),
        ("a b c d", ("a b c d",), "words", 1.0),
        ("A, B; c d", ("a b c d",), "words", 1.0),
        ("d c b a", ("a b c d",), "words", 0.25),
        ("x a x b", ("a b c d",), "words", 0.5),
        ("", ("a",), "words", 0.0),
    ],
)
def test_scores(answer, references, scoring, worth):
    assert score(answer, references, scoring) == worth


@pytest.mark.parametrize(("references", "scoring"), [((), "recall"), (("a",), "bleu")])
def test_unknown_scores_are_refused(references, scoring):
    with pytest.raises(InvalidInputError):
        score("a", references, scoring)


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
def test_too_few_tokens_for_a_list_are_refused(task):
    with pytest.raises(InvalidInputError, match="no room"):
        case(task, tokens=CHAT_TOKENS + 3)


def test_prose_is_long_enough_wherever_it_begins():
    for seed in range(5):
        assert len(prose(random.Random(seed), 4000)) >= 4000 * 6
    whole = prose(random.Random(0), 10**6)
    assert whole.startswith("PRIDE AND PREJUDICE")


def test_cases_have_names_of_their_own_and_are_as_many_as_asked_for():
    found = make_cases(WordTokenizer(), lengths=(300, 400), depths=(0.2, 0.8), tokens=300, samples=2, seed=5)
    assert len({one.name for one in found}) == len(found) == 4 + 2 * len(TASKS)
    assert [(one.tokens, one.depth) for one in found[:4]] == [(300, 0.2), (300, 0.8), (400, 0.2), (400, 0.8)]


def test_an_arm_is_asked_and_its_bytes_are_measured():
    """The tiny model says noise; what counts is that its own words are what is scored."""
    found = needle_tasks.needle(WordTokenizer(), TOKENS, 0, 0.5)
    pipe = ours()
    outcomes = [
        ask(pipe, found, arm) for arm in (uncompressed(), Arm("packed", lambda: TurboQuant(bits=2), "yours"))
    ]
    expected = pipe(
        found.context,
        question=found.question,
        answer_prefix=found.answer_prefix,
        max_new_tokens=found.answer_tokens,
    )
    assert outcomes[0].answer == expected["answer"]
    assert outcomes[0].score == score(expected["answer"], found.references, "recall")
    assert outcomes[0].uncompressed_bytes == outcomes[1].uncompressed_bytes > outcomes[1].resident_bytes
    assert (outcomes[0].tokens, outcomes[0].depth) == (TOKENS, 0.5)
