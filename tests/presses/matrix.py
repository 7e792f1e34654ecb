"""What the tests of every kvpress press share: the catalogue of `docs/`, a model, a context, pipelines."""

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from transformers import PreTrainedModel

from quantpress.errors import CompositionError
from quantpress.pipelines.text_generation import TextGenerationPipeline
from quantpress.presses import Compose, TurboQuant
from tests.pipelines.words import text, word_tokenizer
from tests.tiny_models import tiny_model
from tests.versions import NO_ADAPTERS, kvpress_pipeline

_PATH = Path(__file__).parents[2] / "docs" / "catalogue.py"


@functools.cache
def _catalogue() -> Any:
    import sys

    spec = importlib.util.spec_from_file_location("quantpress_docs_catalogue", _PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


catalogue = _catalogue()
CONTEXT_TOKENS = 640  # half of them: 4 sinks, one or two pages, the rest recent
CONTEXT = f"{text(CONTEXT_TOKENS - 22)} <user> {text(catalogue.FINCH_WINDOW, seed=5)}"
QUESTION = text(5, seed=1)
NEW_TOKENS = 8


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """A model for a press; RestoreKV, which adds an adapter, has one of its own."""
    model = tiny_model("llama", catalogue.CATALOGUE[name].attention, seed=11)
    if name == "RestoreKVPress":
        model = copy.deepcopy(model)
    model.config._name_or_path = _tokenizer_folder()
    return model


@functools.cache
def _tokenizer_folder() -> str:
    """KVzip loads the tokenizer that has its model's name."""
    folder = tempfile.mkdtemp()
    word_tokenizer().save_pretrained(folder)
    return folder


def missing(name: str) -> str:
    """Why a press cannot be made here; empty when it can."""
    waits = catalogue.CATALOGUE[name].newest != "works"
    return NO_ADAPTERS if waits else ""


def make(name: str) -> kvpress.BasePress:
    """A press of the catalogue; the test is skipped where it cannot be made."""
    if missing(name):
        pytest.skip(missing(name))
    press: kvpress.BasePress = catalogue.CATALOGUE[name].make(model_of(name))
    return press


def refused(name: str) -> str:
    """Why a press does not go before TurboQuant; empty when it does."""
    if missing(name):
        return ""
    try:
        Compose([make(name), TurboQuant()])
    except CompositionError as error:
        return str(error)
    return ""


def questions(name: str) -> list[str]:
    """What the press is tested with."""
    return [""] if catalogue.CATALOGUE[name].one_token else [QUESTION]


def ours(name: str, press: Any, **arguments: Any) -> str:
    """Our pipeline's answer with the model of a press."""
    return _answer(TextGenerationPipeline, name, press, arguments)


def theirs(name: str, press: Any, **arguments: Any) -> str:
    """kvpress's own pipeline's answer; what it leaves on the model is removed."""
    with _cleaned(model_of(name)):
        return _answer(kvpress_pipeline, name, press, arguments)


def _answer(pipeline_class: Any, name: str, press: Any, arguments: dict[str, Any]) -> str:
    pipe = pipeline_class(model=model_of(name), tokenizer=word_tokenizer())
    torch.manual_seed(0)  # CAM merges by chance
    given = {"questions": questions(name), "max_new_tokens": NEW_TOKENS, **arguments}
    answers: list[str] = pipe(CONTEXT, press=press, **given)["answers"]
    return answers[0]


@contextmanager
def _cleaned(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    finally:
        vars(model.model).pop("forward", None)
        for layer in model.model.layers:
            vars(layer.self_attn).pop("masked_key_indices", None)
            layer.self_attn._modules.pop("rotary_emb", None)
