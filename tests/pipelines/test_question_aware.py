"""With question_aware=True the press sees the question; the prompt stays what it is."""

import copy
from typing import Any

import kvpress
import pytest
from transformers import DynamicCache

from quantpress.errors import InvalidInputError
from quantpress.presses import Finch
from tests.pipelines.cases import ALL, CONTEXT, LONG_CONTEXT, QUESTIONS, SNAP
from tests.pipelines.words import ours, word_tokenizer
from tests.presses.reading import lossless
from tests.tiny_models import tiny_model

AWARE = {"question_aware": True, "max_new_tokens": 6}


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("packed", [False, True], ids=["DynamicCache", "lossless"])
def test_without_loss_the_answers_are_those_without_the_question_in_view(chat, packed):
    """Questions of several tokens, of one token, and none."""
    press = lossless() if packed else None
    asked = {"questions": [*QUESTIONS[1:], ""], "answer_prefix": "w3", "max_new_tokens": 6, "press": press}
    blind = ours(chat=chat)(CONTEXT, **asked)
    assert ours(chat=chat)(CONTEXT, question_aware=True, **asked) == blind
    assert ours(chat=chat)([CONTEXT], question_aware=True, **asked) == [blind]
    assert len(set(blind["answers"])) > 1


def fed(run: Any) -> list[list[int]]:
    """The ids of every forward of the model."""
    found: list[list[int]] = []
    embedding = tiny_model("llama").get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda module, args: found.append(args[0][0].tolist()))
    try:
        run()
    finally:
        handle.remove()
    return found


def test_every_token_is_read_once_and_the_press_sees_all_but_the_last():
    pipe = ours()
    inputs = pipe.preprocess(CONTEXT, questions=QUESTIONS)
    context = inputs["context_ids"][0].tolist()
    prompts = [context + one[0].tolist() for one in inputs["questions_ids"]]
    blind = fed(lambda: pipe(CONTEXT, question=QUESTIONS[0], max_new_tokens=1))
    assert blind == [context, prompts[0][len(context) :]]
    aware = fed(lambda: pipe(CONTEXT, questions=QUESTIONS, question_aware=True, max_new_tokens=1))
    assert aware == [part for prompt in prompts for part in (prompt[:-1], prompt[-1:])]


WAYS = ["adakv", "key_rerotation", "while_decoding", "unequal_and_packed"]


@pytest.mark.parametrize("name", WAYS)
def test_a_press_keeps_what_it_keeps_of_a_text_that_ends_with_the_question(name):
    """Each question as if asked alone, in every way to evict, mask, renumber or pack."""
    pipe, make = ours(), ALL[name]
    asked = QUESTIONS[:2]
    answers = pipe(LONG_CONTEXT, questions=asked, press=make(), **AWARE)["answers"]
    for question, answer in zip(asked, answers, strict=True):  # "\n" stands between question and answer
        by_hand = pipe(f"{LONG_CONTEXT} {question}", press=make(), max_new_tokens=6)
        assert answer == by_hand["answer"]


def test_kvpress_name_means_the_same():
    pipe, asked = (
        ours(),
        {"question": QUESTIONS[0], "press": kvpress.SnapKVPress(0.5, **SNAP), "max_new_tokens": 8},
    )
    wanted = pipe(CONTEXT, question_aware=True, **asked)
    assert pipe(CONTEXT, query_aware=True, **asked) == wanted
    assert ours(compress_questions=True)(CONTEXT, **asked) == wanted
    with pytest.raises(InvalidInputError, match="query_aware is question_aware under another name"):
        pipe(CONTEXT, query_aware=True, question_aware=True, **asked)


def test_the_report_counts_the_question_and_the_largest_reading():
    pipe = ours(report=True)
    inputs = pipe.preprocess(CONTEXT, questions=QUESTIONS)
    prompts = [inputs["context_ids"].shape[1] + one.shape[1] for one in inputs["questions_ids"]]
    report = pipe(CONTEXT, questions=QUESTIONS, **AWARE)["report"]
    assert report.tokens_seen == report.tokens_kept == max(prompts) - 1
    assert 0 < report.new_tokens <= 6 * len(QUESTIONS)
    assert report.prefill_s > 0 < report.decode_s


def test_finch_gets_its_delimiter():
    tokenizer = copy.deepcopy(word_tokenizer())
    pipe = ours()
    pipe.tokenizer = tokenizer
    asked = {"question": QUESTIONS[0], "press": Finch(0.5), "max_new_tokens": 6}
    answer = pipe(CONTEXT, question_aware=True, **asked)
    by_hand = pipe(f"{CONTEXT} <|finch_sep|> {QUESTIONS[0]}", **asked | {"question": ""})
    assert answer == by_hand


def test_what_holds_no_question_names_the_remedy():
    pipe = ours(max_new_tokens=1)
    read = pipe.read(CONTEXT)
    for asking in (pipe, ours(question_aware=True)):
        with pytest.raises(InvalidInputError, match="give the text itself, or leave question_aware out"):
            asking(read, question="w1", **({"question_aware": True} if asking is pipe else {}))
    with pytest.raises(InvalidInputError, match="read\\(\\) reads a context without a question"):
        pipe.read(CONTEXT, question_aware=True)
    with pytest.raises(InvalidInputError, match="once for each of the 2 questions"):
        pipe(CONTEXT, questions=["w1", "w2"], question_aware=True, cache=DynamicCache())
    with pytest.raises(InvalidInputError, match="question_aware is 'yes'; give True or False"):
        pipe(CONTEXT, question_aware="yes")
    assert pipe(read, question="w1", question_aware=False)["answer"]
