"""What every test shares: offline hubs, a fresh seed that a failure prints, and gpu tests only with CUDA."""

import os
import random
import sys

# Before anything imports transformers or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

# Many tests build small models: what counts is that an example passes, not how long it took.
settings.register_profile("quantpress", deadline=None, print_blob=True)
settings.load_profile("quantpress")

SEED_VARIABLE = "QUANTPRESS_TEST_SEED"

collect_ignore = ["comfyui_run.py"]  # a script, for ComfyUI's environment


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of this test's random numbers: fresh each time, printed when the test fails.

    To repeat a failure, set QUANTPRESS_TEST_SEED to the printed number and run the one test.
    """
    value = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(2**31))
    print(f"{SEED_VARIABLE}={value}")
    random.seed(value)
    for name in ("numpy.random", "torch"):  # a test that did not import torch has no use for its generator
        module = sys.modules.get(name)
        if module is not None:
            getattr(module, "manual_seed" if name == "torch" else "seed")(value)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu on a machine without CUDA."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
