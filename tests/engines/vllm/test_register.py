"""Entry point of the plugin where vLLM has not what it needs."""

import sys

import pytest

from quantpress.engines.vllm import register


def test_a_vllm_that_has_moved_runs_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)  # importing it is an error
    register()
    assert "made for 0.33" in caplog.text and ".[vllm]" in caplog.text
