"""What the tests of enabled models share: a prompt, options of generate, and what they look at."""

from typing import Any

import pytest
from torch import nn

from quantpress.cache import PackedLayer
from quantpress.pipelines.capture.captured_steps import CapturedDecoding
from quantpress.pipelines.enabling import generate_call
from quantpress.presses import SnapKV
from tests.tiny_models import prompt

TOKENS = 420
IDS = prompt(TOKENS, seed=3)
NEXT = prompt(20, seed=5)
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}
FULL = {**GREEDY, "return_dict_in_generate": True}
SNAP = SnapKV(0.5, window_size=16)
NO_END = {"eos_token_id": [255], "pad_token_id": 0}  # prompt lookup needs one


def packed(cache: Any) -> list[bool]:
    return [isinstance(layer, PackedLayer) and layer.packed_tokens > 0 for layer in cache.layers]


def state(model: nn.Module) -> dict[str, Any]:
    """The identity of everything that every module of a model holds, including hooks."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            inner = list(value.items()) if isinstance(value, dict) else value
            found[f"{name}.{attribute}"] = [(k, id(v)) for k, v in inner] if inner is not value else id(value)
    return found


def noted_steps(monkeypatch: pytest.MonkeyPatch) -> list[CapturedDecoding]:
    """The steps that every later call of an enabled model makes."""
    steps: list[CapturedDecoding] = []

    class Noted(CapturedDecoding):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            steps.append(self)

    monkeypatch.setattr(generate_call, "CapturedDecoding", Noted)
    return steps
