"""The progress bar: one step a layer, only when wanted, and no hook is left."""

import sys

import pytest
import torch

from quantpress.pipelines.reading.read_context import LONG_CONTEXT, layer_progress
from tests.pipelines.words import ours, text
from tests.tiny_models import prompt, tiny_model


def _read(tokens, show, capsys):
    model = tiny_model("llama")
    with torch.no_grad(), layer_progress(model, tokens, show):
        model.model(prompt(8))
    return capsys.readouterr().err


def test_a_bar_counts_the_layers(capsys):
    err = _read(1234, True, capsys)
    assert "reading 1,234 tokens" in err
    assert "3/3" in err


@pytest.mark.parametrize(
    ("tokens", "show", "terminal", "shown"),
    [
        (LONG_CONTEXT + 1, None, True, True),
        (LONG_CONTEXT, None, True, False),  # and fast
        (LONG_CONTEXT + 1, None, False, False),
        (LONG_CONTEXT + 1, False, True, False),
        (8, True, False, True),
    ],
)
def test_a_bar_shows_where_it_is_wanted(tokens, show, terminal, shown, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert bool(_read(tokens, show, capsys)) == shown


def test_no_hook_is_left_after_an_exception(capsys):
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), layer_progress(model, 8, True):
        raise ZeroDivisionError
    assert not any(part._forward_hooks for part in model.modules())


def test_the_pipeline_shows_it_on_request(capsys):
    ours()(text(50), max_new_tokens=1, progress=True)
    assert "reading 51 tokens" in capsys.readouterr().err
