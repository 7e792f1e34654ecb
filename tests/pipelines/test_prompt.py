"""Chat form: where the context ends and the question begins."""

import copy

import kvpress
import pytest

from quantpress.errors import EmptyContextError, InvalidInputError
from quantpress.pipelines.prompt import END_OF_CONTEXT, chat_form, token_ids
from tests.pipelines.words import text, word_tokenizer


def _with(**attributes):
    tokenizer = copy.deepcopy(word_tokenizer())
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_without_a_template_bos_begins_and_a_line_break_ends():
    assert chat_form(word_tokenizer(), "w1 w2") == ("<s>w1 w2", "\n")


def test_a_tokenizer_without_bos_begins_with_the_context():
    assert chat_form(_with(bos_token=None), "w1 w2") == ("w1 w2", "\n")


@pytest.mark.parametrize("context", ["w1", "w1 ##", f"w1 {END_OF_CONTEXT} w2", END_OF_CONTEXT * 2])
def test_a_template_is_cut_after_the_context(context):
    before, after = chat_form(word_tokenizer(chat=True), context, enable_thinking=True)
    assert before == f"<s><user> {context}"
    assert after == " <answer> w0 "


def test_the_form_is_that_of_kvpress():
    pipe = kvpress.KVPressTextGenerationPipeline.__new__(kvpress.KVPressTextGenerationPipeline)
    pipe.tokenizer = word_tokenizer(chat=True)
    theirs = pipe.preprocess(text(50), ["w3"], "w4", max_context_length=99)
    before, after = chat_form(word_tokenizer(chat=True), text(50), enable_thinking=False)
    assert token_ids(word_tokenizer(), before, "context").equal(theirs["context_ids"])
    assert token_ids(word_tokenizer(), f"w3{after}w4", "question").equal(theirs["questions_ids"][0])


@pytest.mark.parametrize(("template", "times"), [("{{ messages[0].content }}" * 2, 2), ("hello", 0)])
def test_a_template_must_show_the_context_once(template, times):
    with pytest.raises(InvalidInputError, match=f"{times} times, not once"):
        chat_form(_with(chat_template=template), "w1")


def test_a_question_without_tokens_is_refused():
    with pytest.raises(EmptyContextError, match="question"):
        token_ids(word_tokenizer(), " ", "question")
