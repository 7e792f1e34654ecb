"""Short contexts: every press reads them or says why not, and a warning says when nothing was packed."""

import re
from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from quantpress import enable
from quantpress.codecs.raw import RawPages
from quantpress.errors import InvalidInputError
from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import (
    TOVA,
    AdaKV,
    Block,
    Cap,
    Compactor,
    Compose,
    Knorm,
    KVCompose,
    SnapKV,
    TurboQuant,
)
from quantpress.presses.expression import parse_press
from tests.pipelines.words import ours, text
from tests.presses.matrix import catalogue, make, model_of, refused
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

TOKENS = (1, 2, 3, 5)
UNPACKED_IS_AN_ERROR = pytest.mark.filterwarnings("error:nothing of this context was packed")
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


@UNPACKED_IS_AN_ERROR
@pytest.mark.parametrize(
    ("press", "least", "said"),
    [
        ("TurboQuant(4)", 260, "259 tokens, .* at 260 .4 sinks, 128 recent.*context or"),
        ("TurboQuant.preset('small')", 196, "195 tokens, .* at 196 "),
        (
            "SnapKV(0.5) | TurboQuant(4, recent_tokens=0)",
            264,
            "131 tokens of 263.* evict fewer tokens or",
        ),
    ],
)
def test_a_context_too_short_to_be_packed_gives_one_warning(press: str, least: int, said: str) -> None:
    model, used = tiny_model("llama"), parse_press(press)
    with pytest.warns(UserWarning, match=f"nothing of this context was packed: .*{said}") as given:
        for _ in range(2):
            read(model, used, prompt(least - 1))
    assert len(given) == 1
    assert read(model, parse_press(press), prompt(least)).layers[0].packed_tokens == 128


def test_a_short_prompt_of_an_enabled_model_gives_one_warning() -> None:
    model = tiny_model("llama")
    with enable(model, 4), pytest.warns(UserWarning, match="nothing of this context was packed") as given:
        for tokens in (20, 30):
            model.generate(prompt(tokens), max_new_tokens=2)
    assert len(given) == 1


def test_a_press_that_evicts_at_its_exit_is_told_too() -> None:
    with pytest.warns(UserWarning, match="nothing of this context was packed: .* of 40, .* at 260"):
        read(tiny_model("llama"), KVCompose(compression_ratio=0.5) | TurboQuant(4), prompt(40))


@UNPACKED_IS_AN_ERROR
def test_a_lossless_codec_is_not_warned_of() -> None:
    read(tiny_model("llama"), TurboQuant(codec=lambda dim, *_: RawPages(dim)), prompt(20))


@pytest.mark.parametrize(
    ("press", "has", "needs"),
    [
        (kvpress.ObservedAttentionPress(0.5), "sdpa", "eager"),
        (AdaKV(Knorm(0.5)), "eager", "sdpa"),
        (Block(Knorm(0.5)), "eager", "sdpa"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_press_that_needs_other_attention_says_which(press: Any, has: str, needs: str) -> None:
    """A longer context would not help."""
    message = rf'cannot compress: .*\. Load the model with attn_implementation="{needs}"'
    with pytest.raises(InvalidInputError, match=message):
        read(tiny_model("llama", has), Compose([press]), prompt(TOKENS[-1] * 20))
