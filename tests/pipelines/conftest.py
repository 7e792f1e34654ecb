"""The default model, fetched and converted once for the machine."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantpress.pipelines.default_model import ensure_default_model


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's folder in the user's cache; the first test ever that asks for it fetches it."""
    return ensure_default_model()


@pytest.fixture(scope="session")
def default_tokenizer(default_model_path: Path) -> PreTrainedTokenizerBase:
    """The default model's tokenizer."""
    return AutoTokenizer.from_pretrained(default_model_path)


@pytest.fixture(scope="session")
def default_model(default_model_path: Path) -> PreTrainedModel:
    """The default model, in whichever of bf16 and float32 this CPU is quicker with."""
    return AutoModelForCausalLM.from_pretrained(default_model_path, dtype=_quick_dtype())


@functools.cache
def _quick_dtype() -> torch.dtype:
    def seconds(multiply: Callable[[], torch.Tensor]) -> float:
        multiply()
        start = time.perf_counter()
        for _ in range(5):
            multiply()
        return time.perf_counter() - start

    times = {}
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        times[dtype] = seconds(functools.partial(torch.matmul, left, right))
    return min(times, key=lambda dtype: times[dtype])
