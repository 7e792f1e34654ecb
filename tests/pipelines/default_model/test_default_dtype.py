"""The default model's dtype: the caller's, else the environment's, else the faster one here."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig

from quantpress.errors import InvalidInputError, QuantPressError
from quantpress.pipelines import TASK, register
from quantpress.pipelines.default_model import lazy, quick_dtype
from quantpress.pipelines.default_model import quick_dtype as function
from tests.pipelines.words import word_tokenizer
from tests.tiny_models import tiny_model

VARIABLE = "QUANTPRESS_DTYPE"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small bfloat16 model in place of the default one."""
    copy.deepcopy(tiny_model("llama")).bfloat16().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(lazy, "ensure_default_model", lambda cache_dir: tmp_path)
    register()
    return tmp_path


def made(**options: Any) -> torch.dtype:
    """The dtype of the pipeline's parameters."""
    make: Any = transformers.pipeline
    (dtype,) = {parameter.dtype for parameter in make(TASK, **options).model.parameters()}
    return dtype


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_plain_line_loads_what_the_environment_says(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, name)
    assert made() == getattr(torch, name)


@pytest.mark.filterwarnings("ignore::UserWarning:transformers")
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16},
        {"dtype": "float16"},
        {"torch_dtype": "float16"},
        {"model_kwargs": {"dtype": torch.float16}},
        {"model_kwargs": {"torch_dtype": torch.float16}},
    ],
    ids=str,
)
def test_what_the_caller_says_wins(
    options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "float32")
    assert made(**options) == torch.float16


def test_a_model_that_was_named_keeps_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "float32")
    assert made(model=str(folder)) == torch.bfloat16


def test_a_wrong_dtype_is_refused_and_nothing_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("float64", "bf16", "Float32"):
        monkeypatch.setenv(VARIABLE, value)
        wanted = f"QUANTPRESS_DTYPE is '{value}'; set it to bfloat16, float32 or float16"
        with pytest.raises(InvalidInputError, match=wanted):
            quick_dtype()
        with pytest.raises(InvalidInputError, match=wanted):
            made()


def _config_reads_dtype() -> bool:
    try:
        LlamaConfig.from_dict({}, dtype="fp16")
    except AttributeError:
        return True
    return False


CONFIG_READS_DTYPE = _config_reads_dtype()


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"dtype": "bf16"}, {"torch_dtype": "int8"}, {"model_kwargs": {"dtype": "fp16"}}, {"dtype": torch.int64}],
    ids=str,
)
def test_a_dtype_that_is_none_does_not_load_float32(
    named: bool, options: dict[str, Any], folder: Path
) -> None:
    error, words = QuantPressError, r"dtype is .*; use bfloat16, float32 or float16"
    if options.get("model_kwargs") and CONFIG_READS_DTYPE:
        error, words = AttributeError, "has no attribute 'fp16'"  # transformers is first
    with pytest.raises(error, match=words):
        made(**options, **({"model": str(folder)} if named else {}))


def test_a_dtype_that_is_none_is_refused_beside_a_loaded_model() -> None:
    register()
    with pytest.raises(InvalidInputError, match="dtype is 'bf16'"):
        made(model=tiny_model("llama"), tokenizer=word_tokenizer(), dtype="bf16")


def test_the_class_has_the_name_that_transformers_finds_its_own_by() -> None:
    """A saved pipeline names it, and so does the `auto_map` of a repository with code of its own."""
    register()
    (kind,) = transformers.pipelines.PIPELINE_REGISTRY.supported_tasks[TASK]["pt"]
    assert issubclass(kind, getattr(transformers, kind.__name__))


@pytest.mark.parametrize(("bfloat16", "float32", "wanted"), [(2, 1, "float32"), (1, 2, "bfloat16")])
def test_the_quicker_one_is_taken(
    bfloat16: int, float32: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speeds of this machine do not matter: the test sets its clock."""
    now, ticks = [0.0], []

    def clock() -> float:
        if len(ticks) % 2:  # the end of a multiplication; they take turns
            now[0] += (bfloat16, float32)[len(ticks) // 2 % 2]
        ticks.append(now[0])
        return now[0]

    module: Any = function.__globals__
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(module, "time", SimpleNamespace(perf_counter=clock))
    assert module["_quicker_name"].__wrapped__() == wanted


def test_a_gpu_takes_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert function.__globals__["_quicker_name"].__wrapped__() == "bfloat16"
