"""The ComfyUI node, in a small double of ComfyUI and, where there is a checkout, in ComfyUI itself."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quantpress.errors import NotAppliedError, UnsupportedBitsError, UnsupportedModelError
from tests.examples.comfyui_double import Diffusion, Guider, Patcher
from tests.limits import HANG

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "comfyui_turboquant"
COMFYUI = os.environ.get("COMFYUI_PATH")


@pytest.fixture(scope="module")
def node() -> ModuleType:
    """The folder, imported the way ComfyUI imports what lies in custom_nodes: by path."""
    spec = importlib.util.spec_from_file_location("comfyui_turboquant", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def patcher() -> Patcher:
    return Patcher(Diffusion())


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 192, 64)


def patched(node: ModuleType, model: Patcher, bits: str = "8") -> Patcher:
    made: Patcher = node.NODE_CLASS_MAPPINGS["TurboQuantPatch"]().patch(model, True, bits)[0]
    return made


def record(model: Patcher) -> Any:
    return model.attachments["turboquant"].record


def test_what_comfyui_asks_of_a_node(node: ModuleType) -> None:
    made = node.NODE_CLASS_MAPPINGS["TurboQuantPatch"]
    inputs = made.INPUT_TYPES()["required"]
    assert list(inputs) == ["model", "enabled", "bits"] and made.RETURN_TYPES == ("MODEL",)
    assert set(node.NODE_DISPLAY_NAME_MAPPINGS) == set(node.NODE_CLASS_MAPPINGS)
    for bits in inputs["bits"][0]:
        patched(node, Patcher(Diffusion()), bits)
    assert callable(getattr(made(), made.FUNCTION))


def test_disabled_gives_the_same_model(node: ModuleType, patcher: Patcher) -> None:
    assert node.TurboQuantPatch().patch(patcher, False, "4")[0] is patcher
    assert patcher.model_options == {"transformer_options": {}} and not patcher.wrappers


def test_both_layouts_are_compressed_and_the_input_stays(
    node: ModuleType, patcher: Patcher, x: torch.Tensor
) -> None:
    exact = Guider(patcher).sample(x)
    model = patched(node, patcher)
    got = Guider(model).sample(x)
    assert [call.key_shape for call in record(model).calls] == [(2, 2, 192, 32)] * 4
    assert 0 < record(model).output_error < 1e-3
    assert not torch.equal(got, exact) and torch.allclose(got, exact, rtol=0.05, atol=0.05)
    assert torch.equal(Guider(patcher).sample(x), exact)
    assert patcher.model_options == {"transformer_options": {}}
    assert not patcher.wrappers and not patcher.attachments


def test_fewer_bits_cost_accuracy(node: ModuleType, patcher: Patcher, x: torch.Tensor) -> None:
    errors = []
    for bits in ("2", "3", "4", "8"):
        model = patched(node, patcher, bits)
        Guider(model).sample(x)
        errors.append(record(model).output_error)
    assert errors == sorted(errors, reverse=True)


def test_statistics_of_each_clone_start_at_zero(node: ModuleType, patcher: Patcher, x: torch.Tensor) -> None:
    first = patched(node, patcher)
    second = first.clone()
    Guider(first).sample(x)
    Guider(first).sample(x)
    assert (len(record(first).calls), record(second).seen) == (4, 0)
    Guider(second).sample(x, steps=1)
    assert (len(record(first).calls), len(record(second).calls)) == (4, 2)


def test_an_override_of_another_node_goes_on_to_work(
    node: ModuleType, patcher: Patcher, x: torch.Tensor
) -> None:
    seen = []

    def other(function: Any, q: Any, k: Any, v: Any, heads: int, *rest: Any, **options: Any) -> Any:
        seen.append(function.__name__)
        return 2 * function(q, k, v, heads, *rest, **options)

    model = patcher.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    exact = Guider(model).sample(x)
    seen.clear()
    got = Guider(patched(node, model)).sample(x)
    assert seen == ["attention"] * 8  # each call once more, on keys and values as they came
    assert torch.allclose(got, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def test_the_last_of_two_nodes_counts(node: ModuleType, patcher: Patcher, x: torch.Tensor) -> None:
    twice = patched(node, patched(node, patcher, "2"), "8")
    once = patched(node, patcher, "8")
    assert torch.equal(Guider(twice).sample(x), Guider(once).sample(x))
    assert len(record(twice).calls) == 4


def test_outside_of_sampling_nothing_happens(node: ModuleType, patcher: Patcher, x: torch.Tensor) -> None:
    model = patched(node, patcher, "2")
    options = model.model_options["transformer_options"]
    assert torch.equal(patcher.model(x, options), patcher.model(x, {}))
    assert not record(model).seen


def test_errors(node: ModuleType, patcher: Patcher, x: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="model incompatible: a str takes no attention override"):
        node.TurboQuantPatch().patch("model", True, "4")
    with pytest.raises(UnsupportedBitsError, match="17"):
        patched(node, patcher, "17")
    silent = Patcher(torch.nn.Identity())
    silent.model.forward = lambda x, transformer_options: x  # type: ignore[method-assign]
    with pytest.raises(NotAppliedError, match="compression not applied: no attention call of Identity"):
        Guider(patched(node, silent)).sample(x)
    model = patched(node, patcher)
    patcher.model.qkv.forward = _fail  # type: ignore[method-assign,union-attr]
    with pytest.raises(RuntimeError, match="on purpose"):
        Guider(model).sample(x)
    del patcher.model.qkv.forward
    assert torch.equal(patcher.model(x, model.model_options["transformer_options"]), patcher.model(x, {}))


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


@pytest.mark.slow
@pytest.mark.skipif(COMFYUI is None, reason="set COMFYUI_PATH to a checkout of ComfyUI")
def test_in_comfyui_itself() -> None:
    """ComfyUI's own models, patcher, sampler and attention. Its requirements must be installed."""
    path = os.pathsep.join([str(COMFYUI), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "examples" / "comfyui_run.py"), str(FOLDER)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr[-4000:]
    said = {one["model"]: one for one in map(json.loads, done.stdout.strip().splitlines())}
    assert set(said) == {"unet", "flux"}
    for one in said.values():
        assert one["changed"] and one["same"] and one["restored"], one
        assert one["skipped"] == 0 and 0 < one["output_error"] < 1e-3 and one["error"] < 1e-3, one
        assert one["calls"][0] == one["calls"][1] > 0, one
    assert said["flux"]["shapes"] == [[2, 164, 32]]  # 144 patches of the image and 20 tokens of text
