"""What every test shares: offline hubs, a fresh seed that a failure prints, gpu tests only with CUDA, and the
default model, fetched and converted once for the machine.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before anything imports transformers or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Many tests build small models: what counts is that an example passes, not how long it took.
settings.register_profile("quantpress", deadline=None, print_blob=True)
settings.load_profile("quantpress")

# They start first: a long test that starts last keeps one worker while the others have nothing left to do.
# A worker takes tests over from the end of another's list, so that those of the kernels stay with one, and
# share its process of Triton's interpreter.
LONGEST = ("tests/conformance/test_kvpress_suite.py", "tests/kernels/", "tests/test_packaging.py")

SEED_VARIABLE = "QUANTPRESS_TEST_SEED"

collect_ignore = ["examples/comfyui_run.py"]  # a script, for ComfyUI's environment


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of this test's random numbers: fresh each time, printed when the test fails.

    To repeat a failure, set QUANTPRESS_TEST_SEED to the printed number and run the one test.
    """
    value = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(2**31))
    print(f"{SEED_VARIABLE}={value}")
    random.seed(value)
    numbers, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numbers is not None:
        numbers.seed(value)
    if torch is not None:  # a test that did not import it has no use for its generator
        # `torch.manual_seed` also formats the whole stack three times, for devices that may come later.
        (torch if torch.cuda.is_available() else torch.default_generator).manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def gpu_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """A gpu test gives its memory back, for other processes, and leaves torch as it was, for other tests."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    import torch

    from tests.gpu.gpu_state import process_state, set_sync_debug_mode

    before = process_state()
    yield
    after = process_state()
    if after != before:
        set_sync_debug_mode(before["sync_debug_mode"])
    torch.cuda.empty_cache()
    assert after == before, "this test left settings behind"


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's folder in the user's cache; the first test ever that asks for it fetches it."""
    from quantpress.pipelines.default_model import ensure_default_model

    return ensure_default_model()


@pytest.fixture(scope="session")
def default_tokenizer(default_model_path: Path) -> PreTrainedTokenizerBase:
    """The default model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model_path)


@pytest.fixture(scope="session")
def default_model(default_model_path: Path) -> PreTrainedModel:
    """The default model, in the dtype that is quick here, or that QUANTPRESS_DTYPE names.

    No test may depend on which it is: `QUANTPRESS_DTYPE=float32 make test` and bfloat16 both pass.
    """
    from transformers import AutoModelForCausalLM

    from quantpress.pipelines.default_model import quick_dtype

    return AutoModelForCausalLM.from_pretrained(default_model_path, dtype=quick_dtype())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first, and skip those marked gpu on a machine without CUDA."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection() -> None:
    """Little of what collecting makes is garbage: looking for some takes a fifth of its time."""
    gc.disable()


def pytest_collection_finish() -> None:
    """What was imported stays until the end: the garbage collector need not look at it before every test."""
    gc.collect()
    gc.freeze()
    gc.enable()
