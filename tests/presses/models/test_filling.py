"""A reading that did not fill its cache is an error, and never answered from."""

import copy
from collections.abc import Callable
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from quantpress import enable
from quantpress.cache import host
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.pipelines.reading.read_context import read_context
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Compose, Knorm, TurboQuant
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import prompt, tiny_model

CONTEXT, IDS = text(300), prompt(300)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
PRESSES = {
    "none": None,
    "kvpress": kvpress.KnormPress(0.5),
    "knorm": Knorm(0.5),
    "packed": TurboQuant(4),
    "composed": Compose([Knorm(0.5), TurboQuant(4)]),
}


def own_model(change: Callable[[PreTrainedModel], Any]) -> PreTrainedModel:
    model = copy.deepcopy(tiny_model("llama"))
    change(model)
    return model


def pipe_of(model: PreTrainedModel) -> TextGenerationPipeline:
    return TextGenerationPipeline(model=model, tokenizer=word_tokenizer())


def checkpointed(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable()
    model.train()


def forgetful(model: PreTrainedModel) -> None:
    """Layer 1 takes no notice of the cache."""
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {host.cache_name(module): None}), with_kwargs=True
    )


@pytest.mark.parametrize("name", PRESSES)
def test_gradient_checkpointing_is_named(name: str) -> None:
    press, model = PRESSES[name], own_model(checkpointed)
    pipe = pipe_of(model)
    with pytest.raises(UnsupportedModelError, match=r"gradient checkpointing.*model\.eval\(\)"):
        pipe(CONTEXT, question="w1", press=press)
    with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        pipe.read(CONTEXT, press=press)
    if press is not None:
        with enable(model, press), pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
            model.generate(IDS, **GREEDY)
    if name not in ("none", "kvpress"):
        with pytest.raises(UnsupportedModelError, match="gradient checkpointing"), press(model):
            model.generate(IDS, **GREEDY)
    expected = pipe_of(tiny_model("llama"))(CONTEXT, question="w1", press=press)
    model.gradient_checkpointing_disable()  # in training mode still
    assert pipe(CONTEXT, question="w1", press=press) == expected


def test_a_context_read_before_is_not_asked_under_gradient_checkpointing() -> None:
    model = own_model(lambda model: model.eval())
    pipe = pipe_of(model)
    context = pipe.read(CONTEXT)
    checkpointed(model)
    with pytest.raises(UnsupportedModelError, match="gradient checkpointing"):
        pipe(context, question="w1")


@pytest.mark.parametrize("press", [None, TurboQuant(4)], ids=["none", "packed"])
def test_a_layer_that_takes_no_notice_of_the_cache(press: Any) -> None:
    model = own_model(forgetful)
    with pytest.raises(UnsupportedModelError, match="empty in layers 1 of 3"), torch.no_grad():
        read_context(model, IDS, DynamicCache(), press)
    with enable(model, 4), pytest.raises(UnsupportedModelError, match="empty in layers 1 of 3"):
        model.generate(IDS, **GREEDY)


def test_use_cache_false_in_the_configuration() -> None:
    """What a training leaves behind: reading fills the cache all the same; contexts say that they cannot."""

    def uncached(model: PreTrainedModel) -> None:
        model.config.use_cache = model.generation_config.use_cache = False

    plain, model = tiny_model("llama"), own_model(uncached)
    asked = {"question": "w1", "press": Compose([Knorm(0.5), TurboQuant(4)])}
    assert pipe_of(model)(CONTEXT, **asked) == pipe_of(plain)(CONTEXT, **asked)
    with enable(plain, Compose([Knorm(0.5)])):
        expected = plain.generate(IDS, **GREEDY)
    with enable(model, Compose([Knorm(0.5)])):
        assert torch.equal(model.generate(IDS, **GREEDY), expected)
        assert torch.equal(model.generate(IDS, use_cache=False, **GREEDY), plain.generate(IDS, **GREEDY))
    with pytest.raises(InvalidInputError, match="use_cache=False"), Knorm(0.5)(model):
        model.generate(IDS, **GREEDY)
    with pytest.warns(UserWarning, match="nothing can be compressed"), TurboQuant(4)(model):
        model.generate(IDS, max_new_tokens=1, do_sample=False)


def test_dropout_is_said() -> None:
    def dropping(model: PreTrainedModel) -> None:
        model.train()
        model.model.layers[0].self_attn.attention_dropout = 0.5

    model = own_model(dropping)
    with pytest.warns(UserWarning, match=r"depends on chance; call model\.eval\(\)"):
        pipe_of(model).read(CONTEXT)
    model.eval()
    pipe_of(model).read(CONTEXT)
