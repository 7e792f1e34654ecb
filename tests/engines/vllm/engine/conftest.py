"""Tests with vLLM's engine in this process, on the CPU: `make test-vllm` sets up and runs them.

Where vLLM is not installed none of them is collected.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engines.vllm.engine.tiny import Truth, save_model

if find_spec("vllm") is None:
    collect_ignore_glob = ["*.py"]

# Before anything imports vLLM, which reads some of them once.
os.environ.update(
    VLLM_TARGET_DEVICE="cpu",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, where tests can look into it
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # leave this process on the cores that it was given
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM warns of much; what warns in quantpress is an error here too."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            item.add_marker(pytest.mark.filterwarnings(r"error:::quantpress\."))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, saved, and a tokenizer whose words are t0 to t511."""
    return save_model(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def truth(folder: Path) -> Truth:
    """What transformers says of the same model."""
    return Truth(folder)
