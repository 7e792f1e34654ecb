"""Finch given as text: the pipeline sets its delimiter, and it then does what kvpress's Finch does."""

import copy
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress.errors import InvalidInputError
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Compose, Finch, KVzip, TurboQuant
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import prompt, tiny_model
from tests.versions import kvpress_pipeline

CONTEXT, QUESTION = text(120), text(20, seed=1)
DELIMITED = f"{CONTEXT} <|finch_sep|> {QUESTION}"


def pipe_of(model: Any) -> TextGenerationPipeline:
    return TextGenerationPipeline(model=model, tokenizer=copy.deepcopy(word_tokenizer()))


def test_finch_as_text_answers_as_kvpress_does() -> None:
    """Every row of the embedding is in use: kvpress's press makes the model grow, ours does not."""
    model, grown = tiny_model("llama"), copy.deepcopy(tiny_model("llama"))
    before = model.get_input_embeddings().weight.shape
    answer = pipe_of(model)(DELIMITED, question=QUESTION, press="Finch(0.5)", max_new_tokens=8)["answer"]
    assert model.get_input_embeddings().weight.shape == before
    theirs, tokenizer = kvpress.FinchPress(0.5), copy.deepcopy(word_tokenizer())
    theirs.update_model_and_tokenizer(grown, tokenizer)
    grown.lm_head.weight.data[-1] = 0  # the model never chooses the new token
    pipe = kvpress_pipeline(model=grown, tokenizer=tokenizer)
    assert answer == pipe(DELIMITED, question=QUESTION, press=theirs, max_new_tokens=8)["answer"]


def test_finch_before_a_quantizer_and_in_a_context_that_is_kept() -> None:
    pipe = pipe_of(tiny_model("llama"))
    press = "Finch(0.5) | TurboQuant(4, recent_tokens=16)"
    read = pipe.read(DELIMITED, press=press)
    assert 0 < read.tokens_seen < 80
    assert (
        pipe(read, question=QUESTION)["answer"] == pipe(DELIMITED, question=QUESTION, press=press)["answer"]
    )
    theirs = [kvpress.FinchPress(0.5), TurboQuant(4)]
    assert pipe_of(copy.deepcopy(tiny_model("llama")))(DELIMITED, question=QUESTION, press=theirs)["answer"]


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (CONTEXT, "is not in the context"),
        (f"{DELIMITED} <|finch_sep|> w1", "stands in 2 places"),
        (f"{CONTEXT} <|finch_sep|>", "has no question behind it"),
    ],
    ids=["none", "two", "last"],
)
def test_a_delimiter_that_is_not_where_it_should_be(context: str, words: str) -> None:
    pipe = pipe_of(tiny_model("llama"))
    assert pipe(DELIMITED, press="Finch(0.5)")["answer"]  # leaves nothing for the next context
    for press in ("Finch(0.5)", "Finch(0.5) | TurboQuant(4)"):
        with pytest.raises(
            InvalidInputError, match=f"{words}; put it once between the context and the question"
        ):
            pipe(context, question=QUESTION, press=press)


@pytest.mark.parametrize("press", [Finch(0.5), Compose([Finch(0.5), TurboQuant(4)])], ids=repr)
def test_a_context_of_ones_own_names_the_remedy(press: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"press\.update_model_and_tokenizer\(model, tokenizer\)"):
        read_context(tiny_model("llama"), prompt(60), DynamicCache(), press)


def test_a_tokenizer_that_cannot_be_found_by_name_is_named() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.config._name_or_path = "no/such/folder/at/all"
    for press in (KVzip(0.5), Compose([KVzip(0.5), TurboQuant(4)])):
        named = r"KVzip loads the tokenizer .*'no/such/folder/at/all'"
        with pytest.raises(InvalidInputError, match=named), torch.no_grad():
            read_context(model, prompt(60), DynamicCache(), press)
