"""Contexts of a few tokens: every press reads them, or names itself, their number and the remedy."""

import re
from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress.errors import InvalidInputError
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import TOVA, Cap, Compactor, Compose, SnapKV, TurboQuant
from tests.pipelines.words import ours, text
from tests.presses.matrix import catalogue, make, model_of, refused
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

TOKENS = (1, 2, 3, 5)
NAMES = [name for name, entry in catalogue.CATALOGUE.items() if entry.kind != catalogue.BASE]


def outcome(tokens: int, run: Callable[..., Any], *arguments: Any) -> str:
    """ "" or what is wrong: an error that does not say which press, how many tokens and what to do."""
    try:
        run(*arguments)
    except InvalidInputError as error:
        wanted = (
            rf"\w+(Press)?\b.* cannot compress this context of {tokens} tokens: .+\. Give a longer context"
        )
        return "" if re.match(wanted, str(error)) or "delimiter" in str(error) else str(error)
    except Exception as error:
        return repr(error)
    return ""


@pytest.mark.parametrize("name", NAMES)
def test_every_press_of_kvpress(name: str) -> None:
    model, wrong = model_of(name), {}
    for tokens in TOKENS:
        ids = prompt(tokens)
        ids[ids == catalogue.DELIMITER_ID] += 1
        if name == "FinchPress" and tokens > 2:
            ids[0, 1] = catalogue.DELIMITER_ID
        presses = {"alone": lambda: make(name), "composed": lambda: Compose([make(name)])}
        if not refused(name):
            presses["packed"] = lambda: Compose([make(name), TurboQuant(4)])
        for how, press in presses.items():
            with torch.no_grad():
                wrong[tokens, how] = outcome(tokens, read_context, model, ids, DynamicCache(), press())
            for module in model.modules():
                vars(module).pop("masked_key_indices", None)
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize("press", [Cap, Compactor, TOVA, SnapKV, Compose([TOVA])], ids=repr)
def test_contexts_of_ones_own(press: Any) -> None:
    press = press() if isinstance(press, type) else press
    for tokens in TOKENS:
        assert outcome(tokens, read, tiny_model("llama"), press, prompt(tokens)) == ""


def test_the_pipeline_answers_or_says_why() -> None:
    pipe = ours()
    assert pipe(text(3), question="w1", press="TOVA(0.5)", max_new_tokens=3)["answer"]
    with pytest.raises(
        InvalidInputError, match=r"Compactor\(.*this context of 3 tokens.*Give a longer context"
    ):
        pipe(text(2), question="w1", press="Compactor(0.5) | TurboQuant(4)")


def test_errors_of_other_presses_are_their_own() -> None:
    class Failing(kvpress.ScorerPress):
        def score(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            raise RuntimeError("of its own")

    for press in (Failing(0.5), Compose([Failing(0.5)])):
        with pytest.raises(RuntimeError, match="of its own"), torch.no_grad():
            read_context(tiny_model("llama"), prompt(3), DynamicCache(), press)
