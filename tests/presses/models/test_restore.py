"""A model is as it was, after a press's normal end and after an exception inside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import kvpress
import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantpress.cache import PackedLayer, install_packed_attention, uninstall_packed_attention
from quantpress.errors import InvalidInputError
from quantpress.presses import (
    AdaKV,
    Compose,
    ExpectedAttention,
    KeyRerotation,
    Knorm,
    KVCompose,
    SnapKV,
    StreamingLLM,
    TurboQuant,
)
from tests.cache.caches import functions, functions_left_alone
from tests.presses.reading import multimodal_gemma3, read
from tests.tiny_models import prompt, tiny_model

IDS = prompt(300)
PRESSES: dict[str, Callable[[], Any]] = {
    "TurboQuant": TurboQuant,
    "SnapKV, TurboQuant": lambda: Compose([SnapKV, TurboQuant]),
    "KeyRerotation, TurboQuant": lambda: Compose([KeyRerotation(StreamingLLM()), TurboQuant]),
    "ExpectedAttention": lambda: Compose([ExpectedAttention]),
    "KVCompose, TurboQuant": lambda: Compose([KVCompose, TurboQuant]),
    "AdaKV, TurboQuant": lambda: Compose([AdaKV, TurboQuant]),
}


class BoomError(Exception):
    """What goes wrong in these tests."""


def attributes(module: nn.Module) -> dict[str, Any]:
    """Everything a press could change on a module, by identity."""
    state: dict[str, Any] = {}
    for name, value in vars(module).items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        state |= {f"{name}.{key}": id(entry) for key, entry in entries}
        state[name + "()"] = None
    return state


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    state: dict[str, Any] = {name: attributes(module) for name, module in model.named_modules()}
    state["implementations"] = {
        str(id(module.config)): module.config._attn_implementation
        for module in model.modules()
        if hasattr(module, "config")
    }
    return state


def without_masks(state: dict[str, Any]) -> dict[str, Any]:
    """kvpress's own patch of attention sets `masked_key_indices` on every module at every prefill."""
    return {
        name: {key: value for key, value in entries.items() if "masked_key_indices" not in key}
        for name, entries in state.items()
    }


@contextmanager
def failing(model: PreTrainedModel, layer: int) -> Any:
    """The feed-forward of one layer raises: layers before it are packed, those behind never run."""

    def fail(module: Any, args: Any) -> None:
        raise BoomError

    handle = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture(autouse=True)
def _left_alone() -> Iterator[None]:
    """After each test here, the attention functions are the same objects as before it."""
    with functions_left_alone():
        yield


@pytest.mark.parametrize("name", PRESSES)
def test_after_a_normal_end(name: str) -> None:
    model = tiny_model("qwen3", seed=11)
    before = snapshot(model)
    read(model, PRESSES[name](), IDS)
    assert without_masks(snapshot(model)) == without_masks(before)


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_after_an_exception_in_the_prefill(name: str, layer: int) -> None:
    model = tiny_model("qwen3", seed=11)
    read(model, None, IDS)  # so that kvpress's patch has set what it sets
    before, cache = snapshot(model), DynamicCache()
    with failing(model, layer), pytest.raises(BoomError):
        read(model, PRESSES[name](), IDS, cache)
    assert snapshot(model) == before
    assert type(cache) is DynamicCache and cache.layers == [] and cache.get_seq_length() == 0
    read(model, PRESSES[name](), IDS, cache)  # and the same cache can be filled again
    assert len(cache.layers) == 3


@pytest.mark.parametrize("name", PRESSES)
def test_after_an_exception_in_the_users_own_code(name: str) -> None:
    """A press that then fails too (KVCompose has seen no context) does not hide what went wrong first."""
    model = tiny_model("qwen3", seed=11)
    read(model, None, IDS)
    before = snapshot(model)
    with pytest.raises(BoomError), PRESSES[name]()(model):
        raise BoomError
    assert snapshot(model) == before


def test_a_whole_cache_survives_an_exception_behind_it() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    with pytest.raises(BoomError), torch.inference_mode(), TurboQuant()(model):
        model.model(input_ids=IDS, past_key_values=cache)
        raise BoomError
    assert all(isinstance(layer, PackedLayer) for layer in cache.layers) and cache.get_seq_length() == 300


def test_layers_of_a_configured_cache_come_back_empty() -> None:
    model = tiny_model("gemma3")
    cache = DynamicCache(config=model.config)
    with failing(model, 2), pytest.raises(BoomError):
        read(model, TurboQuant(), IDS, cache)
    kinds = [DynamicSlidingWindowLayer, DynamicLayer, DynamicLayer]
    assert [type(layer) for layer in cache.layers] == kinds
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]
    read(model, TurboQuant(), IDS, cache)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, PackedLayer, PackedLayer]


def test_refused_on_entering() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(InvalidInputError), Compose([SnapKV, TurboQuant(layer_bits={9: 8})])(model):
        pytest.fail("entered")
    assert snapshot(model) == before


def test_what_was_there_before_stays() -> None:
    model = tiny_model("llama", seed=5)
    attention = model.model.layers[0].self_attn
    mine, forward = nn.Identity(), model.model.forward
    attention.rotary_emb, attention.note, model.model.forward = mine, "kept", forward
    handle = attention.register_forward_hook(lambda *args: None)
    before = snapshot(model)
    try:
        read(model, Compose([KVCompose, TurboQuant]), IDS)
        assert attention.note == "kept" and model.model.forward is forward
        assert without_masks(snapshot(model))["model"] == without_masks(before)["model"]
    finally:
        handle.remove()


def test_attention_that_was_installed_before_stays_installed() -> None:
    model = tiny_model("llama")
    install_packed_attention()
    installed = functions()
    with pytest.raises(BoomError), TurboQuant()(model):
        raise BoomError
    assert functions() == installed
    uninstall_packed_attention()


def test_masks_of_head_wise_presses_stay_for_decoding() -> None:
    """And are gone with the next context, as in kvpress."""
    model = tiny_model("llama")
    for press in (Compose([AdaKV]), Compose([AdaKV, TurboQuant])):
        read(model, press, IDS)
        assert all(layer.self_attn.masked_key_indices is not None for layer in model.model.layers)
        read(model, None, IDS)
        assert all(layer.self_attn.masked_key_indices is None for layer in model.model.layers)


def test_contexts_are_nested_evictors_first() -> None:
    order: list[str] = []

    class Loud(kvpress.KnormPress):
        name = ""

        @contextmanager
        def __call__(self, model: Any) -> Any:
            order.append(f"enter {self.name}")
            with super().__call__(model):
                yield
            order.append(f"exit {self.name}")

        def forward_hook(self, module: Any, input: Any, kwargs: Any, output: Any) -> Any:
            if module.layer_idx == 0:
                layer = kwargs["past_key_values"].layers[0]
                order.append(f"hook {self.name} sees {type(layer).__name__} of {layer.get_seq_length()}")
            return super().forward_hook(module, input, kwargs, output)

    first, second = Loud(0.5), Loud(0.5)
    first.name, second.name = "first", "second"
    model = tiny_model("llama")
    cache = read(model, Compose([first, second, TurboQuant]), IDS)
    assert order == [
        "enter first",
        "enter second",
        "hook first sees DynamicLayer of 300",
        "hook second sees DynamicLayer of 150",
        "exit second",
        "exit first",
    ]
    assert isinstance(cache.layers[0], PackedLayer) and cache.get_seq_length() == 75


def test_multimodal_gemma3() -> None:
    model = multimodal_gemma3()
    before = snapshot(model)
    read(model, Compose([Knorm, TurboQuant]), IDS)
    assert without_masks(snapshot(model)) == without_masks(before)
