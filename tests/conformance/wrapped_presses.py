"""A pytest plugin for kvpress's own tests: every press is entered as Compose([press, TurboQuant(lossless)]).

    QUANTPRESS_CONFORMANCE=plain|wrapped  QUANTPRESS_CONFORMANCE_RESULTS=out.json
    python -m pytest -p wrapped_presses .../kvpress-0.5.5/tests        (`both_ways.py` does, once for each)

It runs in a process of its own and imports nothing of our tests. "plain" only writes down the outcomes. Pages
hold 8 tokens instead of 128, so that the short contexts of those tests fill some.
"""

import gc
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

MODE = os.environ.get("QUANTPRESS_CONFORMANCE", "plain")
RESULTS = Path(os.environ.get("QUANTPRESS_CONFORMANCE_RESULTS", "conformance.json"))
PAGE_TOKENS = 8

_outcomes: dict[str, dict[str, str]] = {}
_packed = {"layers": 0, "with pages": 0}
_entering = False


def pytest_configure(config: pytest.Config) -> None:
    """Wrap the contexts of every press class."""
    if MODE == "wrapped":
        _small_pages()
        _count_layers()
        import kvpress

        _kvpress_s_own_pipeline()
        for press_class in _subclasses(kvpress.BasePress):
            if "__call__" in vars(press_class):
                press_class.__call__ = _wrapped(press_class.__call__)


def pytest_collection_finish() -> None:
    """What was imported stays: the garbage collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers in both runs."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of a test's phases, and why."""
    known = _outcomes.get(report.nodeid)
    if known is None or (known["outcome"] != "failed" and report.outcome != "passed"):
        crash = getattr(report.longrepr, "reprcrash", None)
        _outcomes[report.nodeid] = {
            "outcome": report.outcome,
            "reason": "" if report.passed else str(crash.message if crash else report.longrepr),
        }


def pytest_sessionfinish() -> None:
    """Hand the outcomes over."""
    RESULTS.write_text(json.dumps({"outcomes": _outcomes, "packed": _packed}), encoding="utf-8")


def _small_pages() -> None:
    """Before anything else takes the number over."""
    from quantpress.kernels import layout

    layout.PAGE_TOKENS = PAGE_TOKENS
    from quantpress.cache.tokens import packed_tokens as tokens

    assert tokens.PAGE_TOKENS == PAGE_TOKENS


def _kvpress_s_own_pipeline() -> None:
    """Their tests are of their pipeline; importing quantpress has put ours in its place."""
    import kvpress
    from transformers import AutoModelForCausalLM
    from transformers.pipelines import PIPELINE_REGISTRY

    task, theirs = "kv-press-text-generation", kvpress.KVPressTextGenerationPipeline
    del PIPELINE_REGISTRY.supported_tasks[task]
    PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=theirs, pt_model=AutoModelForCausalLM)


def _subclasses(press_class: type) -> Iterator[Any]:
    yield press_class
    for derived in press_class.__subclasses__():
        yield from _subclasses(derived)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def entered(self: Any, model: Any) -> Iterator[None]:
        global _entering
        if _entering:  # by Compose, or by a subclass's super().__call__
            with original(self, model):
                yield
            return
        from quantpress.codecs.raw import RawPages
        from quantpress.presses import Compose, TurboQuant

        bits = 8 * model.dtype.itemsize
        lossless = TurboQuant(
            codec=lambda dim, role, layer: RawPages(dim, bits), sink_tokens=2, recent_tokens=4
        )
        with ExitStack() as stack:
            _entering = True
            try:
                stack.enter_context(Compose([self, lossless])(model))
            finally:
                _entering = False
            yield

    return entered


def _count_layers() -> None:
    from quantpress.cache.layer import PackedLayer

    make = PackedLayer.from_states.__func__  # type: ignore[attr-defined]

    def from_states(cls: type, *args: Any, **options: Any) -> Any:
        layer = make(cls, *args, **options)
        _packed["layers"] += 1
        _packed["with pages"] += bool(layer.packed_tokens)
        return layer

    PackedLayer.from_states = classmethod(from_states)  # type: ignore[assignment]
