"""Tests with vLLM's engine in this process, on the CPU: `make test-vllm` sets up and runs them.

Where vLLM is not installed none of them is collected. Where it runs on a GPU, `pytest -m gpu tests/engines`
runs those that `GPU` names and those marked gpu; the others need no GPU.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engines.vllm.engine.target import ENVIRONMENT, ON_GPU
from tests.engines.vllm.engine.tiny import Truth, save_model

GPU = {"test_schedule.py", "test_nothing_is_lost_where_layers_have_pages_of_their_own_size"}
"""Files and tests."""

if find_spec("vllm") is None:
    collect_ignore_glob = ["*.py"]

os.environ.update(ENVIRONMENT)  # before anything imports vLLM, which reads some of them once
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM warns of much; what warns in quantpress is an error here too."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings(r"error:::quantpress\."))
            if ON_GPU and not GPU.isdisjoint((item.path.name, item.name)):
                item.add_marker(pytest.mark.gpu)
            elif ON_GPU and item.get_closest_marker("gpu") is None:
                item.add_marker(pytest.mark.skip(reason="for vLLM on a CPU"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, saved, and a tokenizer whose words are t0 to t511."""
    return save_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def truth(folder: Path) -> Truth:
    """What transformers says of the same model."""
    return Truth(folder)
