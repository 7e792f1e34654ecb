"""Scans of a model: what they find, and how often they are made."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from quantpress.pipelines.reading.read_context import read_context
from quantpress.presses import TurboQuant
from quantpress.presses.models import attention, scanning
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.models.scanning import modules_below, scanned_once
from tests.tiny_models import prompt, tiny_model


def test_all_modules_in_order_and_each_once() -> None:
    shared = nn.Linear(2, 2)
    tree = nn.Sequential(shared, nn.ModuleDict({"again": shared, "own": nn.Sequential(nn.ReLU())}))
    tree.add_module("none", None)
    for model in (tree, tiny_model("llama")):
        assert modules_below(model) == list(model.modules())


def test_a_scan_is_kept_only_inside() -> None:
    model = nn.Sequential(nn.ReLU())
    with scanned_once():
        assert len(modules_below(model)) == 2
        model.append(nn.ReLU())
        assert len(modules_below(model)) == 2
    assert len(modules_below(model)) == 3


def test_reading_a_context_scans_a_model_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all modules, and once among them for attention; before there were fifteen of both."""
    model, scans = tiny_model("llama"), list[str]()
    for module, name in ((scanning, "_all_below"), (attention, "_attention_below")):
        scan = getattr(module, name)

        def counted(root: nn.Module, scan: scanning.Scan = scan) -> list[nn.Module]:
            scans.append(scan.__name__)
            return scan(root)

        monkeypatch.setattr(module, name, counted)
    with torch.no_grad():
        read_context(model, prompt(300), DynamicCache(), TurboQuant(3), progress=False)
    assert sorted(scans) == ["_all_below", "_attention_below"]
    assert attention_modules(model) == [layer.self_attn for layer in model.model.layers]
