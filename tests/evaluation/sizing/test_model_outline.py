"""Outlines without weights are what models of the same configuration cache and weigh."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from quantpress.cache import cache_memory, host
from quantpress.errors import InvalidInputError
from quantpress.evaluation.sizing.known_models import KnownModel, known_model, known_models
from quantpress.evaluation.sizing.memory_plan import Planner
from quantpress.evaluation.sizing.model_outline import EXAMPLE_SHAPE, ModelOutline, outline
from quantpress.presses import TurboQuant
from tests.tiny_models import _CONFIGS, HYBRID, prompt, tiny_model

EAGER = ("gpt_oss", "bloom", "nemotron")


@pytest.mark.parametrize("family", sorted(_CONFIGS.keys() - HYBRID.keys()))
def test_heads_and_dimensions_are_those_of_the_cache(family: str) -> None:
    model = tiny_model(family, "eager" if family in EAGER else "sdpa")
    found = ModelOutline.of(family, model)
    if family == "bloom":
        assert len(found.layers) + found.other_layers == model.config.num_hidden_layers
        return
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(5), past_key_values=cache)
    assert [layer.index for layer in found.layers] == list(range(len(cache.layers)))
    for layer, cached in zip(found.layers, cache.layers, strict=True):
        keys, values = cached.keys.shape, cached.values.shape
        assert (layer.kv_heads, layer.head_dim, layer.value_dim) == (keys[1], keys[3], values[3])


@pytest.mark.parametrize("family", ["falcon_h1", "jamba", "lfm2", "qwen3_5"])
def test_states_are_those_of_the_cache(family: str) -> None:
    """A layer may keep a state in place of tokens, or beside them; the outline reads nothing for that."""
    model = copy.deepcopy(tiny_model(family)).to(torch.bfloat16)
    found = ModelOutline.of(family, model)
    assert len(found.layers) + found.other_layers == model.config.num_hidden_layers
    if not host.HOLDS_STATES:
        assert "Cache, not in layers" in str(found.refusal)
        return
    cache = host.empty_cache(model)
    with torch.no_grad():
        model(prompt(5), past_key_values=cache)
    memory = cache_memory(cache)
    assert found.state_bytes == memory.state_bytes > 0
    for layer in found.layers:
        assert cache.layers[layer.index].keys.shape[1] == layer.kv_heads
        assert layer.with_state == (memory.layers[layer.index].state_bytes > 0) == (family == "falcon_h1")
    press = TurboQuant(4, recent_tokens=16, balance=False)
    plan = Planner(found, press).plan(600, batch=2)
    assert plan.cache.state_bytes == 2 * found.state_bytes
    assert plan.whole_bytes == Planner(found, None).plan(600, batch=2).cache.total_bytes


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
def test_a_configuration_alone_gives_the_same(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.config.to_json_file(tmp_path / "config.json", use_diff=False)
    found, real = outline(str(tmp_path / "config.json")), ModelOutline.of("it", model)
    assert found.weights_bytes == sum(one.numel() for one in model.parameters()) * found.dtype.itemsize
    assert found.architecture == type(model).__name__
    for one, other in zip(found.layers, real.layers, strict=True):
        assert {**vars(one), "module": None} == {**vars(other), "module": None}
    assert {one.device.type for layer in found.layers for one in layer.module.parameters()} == {"meta"}


@pytest.mark.parametrize("known", known_models().values(), ids=known_models())
def test_a_known_model_has_the_parameters_of_its_checkpoint(
    known: KnownModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", None)  # neither the hub nor its cache is asked
    found = outline(known.repository.upper())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known.config))
    real = ModelOutline.of(found.name, model, torch.bfloat16)
    assert real.weights_bytes == 2 * known.parameters
    assert {**vars(found), "layers": None} == {**vars(real), "layers": None, "repository": known.repository}
    for one, other in zip(found.layers, real.layers, strict=True):
        assert {**vars(one), "module": None} == {**vars(other), "module": None}
        settings = [TurboQuant().layer_settings(layer.module, 64, 64, 0) for layer in (one, other)]
        assert settings[0] == settings[1]
    assert None not in (found.hidden, found.intermediate, found.positions)
    full = sum(not layer.sliding for layer in found.layers)
    assert full == len(found.layers) // (6 if known.name.startswith("gemma-3") else 1)
    assert known_model(known.name) is known


def test_a_folder_comes_before_a_known_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path / "qwen3-8b")
    monkeypatch.chdir(tmp_path)
    assert outline("qwen3-8b").repository is None


def test_a_shape_is_a_llama() -> None:
    found = outline(EXAMPLE_SHAPE)
    hidden, inner, vocabulary, layers = 4096, 14336, 128256, 32
    attention = 2 * hidden * hidden + 2 * hidden * 8 * 128
    weights = layers * (attention + 3 * hidden * inner + 2 * hidden) + 2 * vocabulary * hidden + hidden
    assert found.weights_bytes == 2 * weights
    assert (len(found.layers), found.hidden, found.refusal) == (layers, hidden, None)


def test_a_shape_may_leave_the_weights_open() -> None:
    found = outline("layers=3, kv_heads=2, head_dim=64")
    assert (found.weights_bytes, found.hidden, found.positions) == (None, None, None)
    assert [(one.kv_heads, one.head_dim) for one in found.layers] == [(2, 64)] * 3


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("layers=2,kv_heads=2", "lacks head_dim"),
        ("layers=2,kv_heads=2,head_dim=64,colour=3", "colour=3"),
        ("layers=2,kv_heads=0,head_dim=64", "kv_heads=0"),
        ("layers=two,kv_heads=2,head_dim=64", "layers=two"),
        ("nowhere.json", "no file nowhere.json"),
    ],
)
def test_what_cannot_be_read_is_named(model: str, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        outline(model)


@pytest.mark.parametrize("content", ["not json", json.dumps({"model_type": "no-such-type"}), json.dumps({})])
def test_a_wrong_configuration_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"config\.json cannot be outlined"):
        outline(str(tmp_path / "config.json"))


def test_a_model_that_cannot_be_packed_says_why() -> None:
    assert "sliding window" in str(ModelOutline.of("it", tiny_model("mistral_sliding")).refusal)
