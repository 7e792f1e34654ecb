"""The pipeline's answers are those of kvpress, and each is given as if its question were asked first."""

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress.presses import Compose, Knorm
from tests.pipelines.cases import ALL, CONTEXT, DECODING, LONG_CONTEXT, PRESSES, QUESTIONS, UNEQUAL
from tests.pipelines.words import ours, text, theirs, word_tokenizer
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(("name", "chat"), [*((name, False) for name in PRESSES), ("snapkv", True)])
def test_answers_are_those_of_kvpress(name, chat):
    arguments = {"questions": QUESTIONS, "max_new_tokens": 12, "answer_prefix": "w3 "}
    expected = theirs(chat=chat)(CONTEXT, press=PRESSES[name](), **arguments)
    assert ours(chat=chat)(CONTEXT, press=PRESSES[name](), **arguments) == expected


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_one_question_is_answered_as_in_kvpress(chat):
    arguments = {"question": QUESTIONS[0], "max_new_tokens": 12, "press": PRESSES["knorm"]()}
    assert ours(chat=chat)(CONTEXT, **arguments) == theirs(chat=chat)(CONTEXT, **arguments)


def test_the_press_changes_the_answer():
    arguments = {"question": QUESTIONS[0], "max_new_tokens": 12}
    answers = [ours()(CONTEXT, press=make(), **arguments)["answer"] for make in PRESSES.values()]
    assert len(set(answers)) > len(answers) / 2


@pytest.mark.parametrize("name", DECODING)
def test_presses_that_act_during_decoding_answer_as_in_kvpress(name):
    arguments = {"question": QUESTIONS[0], "max_new_tokens": 20}
    expected = theirs()(CONTEXT, press=DECODING[name](), **arguments)
    assert ours()(CONTEXT, press=DECODING[name](), **arguments) == expected
    assert ours()(CONTEXT, **arguments) != expected


@pytest.mark.parametrize(
    "name", ["snapkv", "adakv", "key_rerotation", *(f"while_{name}" for name in DECODING)]
)
def test_a_composition_is_treated_like_the_press_in_it(name):
    arguments = {"question": QUESTIONS[0], "max_new_tokens": 20}
    expected = ours()(CONTEXT, press=ALL[name](), **arguments)
    assert ours()(CONTEXT, press=Compose([ALL[name]()]), **arguments) == expected
    assert ours()(CONTEXT, press=[ALL[name]()], **arguments) == expected


def test_a_class_means_its_defaults():
    arguments = {"question": QUESTIONS[0], "max_new_tokens": 8}
    expected = ours()(CONTEXT, press=Knorm(0.5), **arguments)
    assert ours()(CONTEXT, press=Knorm, **arguments) == expected
    assert ours(press=[Knorm])(CONTEXT, **arguments) == expected


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gemma3"])
def test_other_families_answer_as_in_kvpress(family):
    arguments = {"questions": QUESTIONS, "max_new_tokens": 8, "press": kvpress.KnormPress(0.5)}
    assert ours(family)(CONTEXT, **arguments) == theirs(family)(CONTEXT, **arguments)


def test_thinking_reaches_the_chat_template():
    arguments = {"question": QUESTIONS[0], "max_new_tokens": 8, "enable_thinking": True}
    expected = theirs(chat=True)(CONTEXT, **arguments)
    assert ours(chat=True)(CONTEXT, **arguments) == expected
    assert ours(chat=True)(CONTEXT, **arguments | {"enable_thinking": False}) != expected


# One press for each way to evict, mask, renumber or pack.
WAYS = ["none", "snapkv", "adakv", "key_rerotation", "dms", *(f"while_{name}" for name in DECODING)]
WAYS += ["pyramidkv", "turboquant", "evict_and_pack", "unequal_and_packed"]


@pytest.mark.parametrize("name", WAYS)
def test_each_question_is_answered_as_if_asked_first(name):
    """After a longer question, and after a shorter one."""
    make, arguments = ALL[name], {"max_new_tokens": 10}
    asked = [QUESTIONS[1], QUESTIONS[2], QUESTIONS[0]]
    together = ours()(LONG_CONTEXT, questions=asked, press=make(), **arguments)["answers"]
    alone = [ours()(LONG_CONTEXT, question=one, press=make(), **arguments)["answer"] for one in asked]
    assert together == alone


@pytest.mark.parametrize("name", [*UNEQUAL, "unequal_and_packed"])
def test_layers_of_different_lengths_answer_a_question_of_several_tokens(name):
    """One mask for all layers fails in attention. Token by token there is no mask, with the same answer."""
    cache, context, make = DynamicCache(), LONG_CONTEXT, ALL[name]
    arguments = {"question": QUESTIONS[1], "max_new_tokens": 8}
    answer = ours()(context, press=make(), cache=cache, **arguments)["answer"]
    assert len({layer.get_seq_length() for layer in cache.layers}) > 1
    inputs = ours().preprocess(context, questions=[QUESTIONS[1]])
    (question_ids,) = inputs["questions_ids"]
    position, asked = inputs["context_ids"].shape[1], question_ids.shape[1]
    ids, model = question_ids[0].tolist(), tiny_model("llama")
    with torch.no_grad():
        for step in range(asked + 7):
            token, place = torch.tensor([[ids[step]]]), torch.tensor([[position + step]])
            logits = model(token, past_key_values=cache, position_ids=place).logits
            if step >= asked - 1:
                ids.append(int(logits[0, -1].argmax()))
    assert answer == word_tokenizer().decode(ids[asked:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["none", "snapkv", "adakv", "evict_and_pack"])
def test_a_given_cache_holds_the_context_and_nothing_else_afterwards(name):
    cache, unasked = DynamicCache(), DynamicCache()
    pipe, context, make = ours(), LONG_CONTEXT, ALL[name]
    given = pipe(context, questions=QUESTIONS, press=make(), cache=cache, max_new_tokens=6)
    pipe(context, press=make(), cache=unasked, max_new_tokens=1)
    assert given == pipe(context, questions=QUESTIONS, press=make(), max_new_tokens=6)
    for layer, other in zip(cache.layers, unasked.layers, strict=True):
        assert layer.get_seq_length() == other.get_seq_length() > 0
        torch.testing.assert_close(_dense(layer.keys), _dense(other.keys), rtol=0, atol=0)
        torch.testing.assert_close(_dense(layer.values), _dense(other.values), rtol=0, atol=0)


def _dense(states):
    return states.dense() if hasattr(states, "dense") else states


def test_a_press_at_the_call_wins_over_the_one_at_construction():
    pipe = ours(press=PRESSES["snapkv"](), max_new_tokens=8)
    names = ("snapkv", "knorm", "none")
    answer = {name: ours()(CONTEXT, press=PRESSES[name](), max_new_tokens=8)["answer"] for name in names}
    assert pipe(CONTEXT)["answer"] == answer["snapkv"]
    assert pipe(CONTEXT, press=PRESSES["knorm"]())["answer"] == answer["knorm"]
    assert pipe(CONTEXT, press=None)["answer"] == answer["none"]
    assert len(set(answer.values())) == 3


def test_every_argument_may_be_given_at_construction():
    pipe = ours(questions=QUESTIONS, answer_prefix="w3 ", max_new_tokens=5, report=True)
    result = pipe(CONTEXT)
    assert set(result) == {"answers", "report"}
    assert pipe(CONTEXT, question=QUESTIONS[2], report=False) == {"answer": result["answers"][2]}


def test_a_list_of_contexts_reads_each_alone():
    contexts = [text(100, seed=4), text(200, seed=5)]
    arguments = {"question": QUESTIONS[0], "max_new_tokens": 6, "press": kvpress.KnormPress(0.5)}
    pipe = ours()
    each = [pipe(context, **arguments) for context in contexts]
    assert pipe(contexts, **arguments) == pipe((one for one in contexts), **arguments) == each
    assert pipe(context=contexts[1], **arguments) == each[1]
    assert pipe([]) == []
