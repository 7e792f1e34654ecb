"""Packing waits for the device once a forward, and what it learns then is as good as what it asked before."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from quantpress.cache import PackedLayer, WidthPlan
from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.errors import NonFiniteError
from quantpress.presses import AdaKV, Compose, Demote, Knorm, TurboQuant
from quantpress.presses.packing import queries, settlement
from quantpress.presses.packing.settlement import Settlement
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

IDS = prompt(420)
WAITING_METHODS = {"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "numpy"}
WAITING_OPERATIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


class Waits(TorchFunctionMode):
    """Counts calls that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self._inside = 0, Operations(self)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in WAITING_METHODS
        with self._inside:
            return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._waits.count += function.name().partition(".")[0] in WAITING_OPERATIONS
        return function(*args, **(kwargs or {}))


def waits_of(press: TurboQuant, layers: int) -> int:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=256,
    )
    model = LlamaForCausalLM(config).eval()
    read(model, press, prompt(300))  # makes the tables that all layers share
    with Waits() as waits:
        cache = read(model, press, prompt(300))
    assert all(layer.packed_tokens for layer in cache.layers)
    return waits.count


@pytest.mark.parametrize("name", ["3 bits", "2.5 bits", "small", "quality"])
def test_no_layer_waits_for_the_device(name: str) -> None:
    press = TurboQuant(float(name[:-5])) if name.endswith(" bits") else TurboQuant.preset(name)
    few, many = waits_of(press, 2), waits_of(press, 5)
    assert 0 < few == many


@pytest.mark.parametrize("name", ["3 bits", "small"])
def test_waiting_checks_keep_no_states_of_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states of 131072 tokens are 1 GB in each layer of an 8B model."""
    press = TurboQuant(3) if name == "3 bits" else TurboQuant.preset(name)
    model, alive, settle = tiny_model("llama"), list[int](), Settlement._settle
    inputs: list[weakref.ref[torch.Tensor]] = []

    def settled(self: Settlement, *checks: Any) -> None:
        gc.collect()
        alive.append(sum(one() is not None for one in inputs))
        settle(self, *checks)

    def noted(module: Any, args: Any, named: Any) -> None:
        inputs.append(weakref.ref(named["hidden_states"]))

    monkeypatch.setattr(Settlement, "_settle", settled)
    with ExitStack() as hooks:
        for layer in model.model.layers:
            handle = layer.self_attn.register_forward_pre_hook(noted, with_kwargs=True)
            hooks.callback(handle.remove)
        read(model, press, IDS)
    assert len(inputs) == len(model.model.layers) > 1 and alive == [0]


def test_a_wait_in_a_layer_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settlement, "collecting", lambda self: nullcontext())
    assert waits_of(TurboQuant(3), 5) >= waits_of(TurboQuant(3), 2) + 3 * 5


@contextmanager
def changed(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """A weight of a model that others share, as it was afterwards."""
    kept = weight.detach().clone()
    with torch.no_grad():
        try:
            yield weight
        finally:
            weight.copy_(kept)


def planes_of(cache: DynamicCache) -> list[dict[str, torch.Tensor]]:
    stores = []
    for layer in cache.layers:
        assert isinstance(layer, PackedLayer) and layer.tokens is not None
        stores += [layer.tokens.key_pages, layer.tokens.value_pages]
    return [store.planes for store in stores]


@pytest.mark.parametrize("held", [0, settlement.MOST_HELD_BYTES])
@pytest.mark.parametrize("bits", [3, 2.5])
def test_scales_have_the_dtype_that_they_need(
    bits: float, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's values are beyond float16; checked at once or at the end, the pages are the same."""
    monkeypatch.setattr(settlement, "MOST_HELD_BYTES", held)
    model = tiny_model("llama", seed=77)
    with changed(model.model.layers[1].self_attn.v_proj.weight) as weight:
        weight.mul_(1e8)
        later = planes_of(read(model, TurboQuant(bits), IDS))
        monkeypatch.setattr(Settlement, "collecting", lambda self: nullcontext())
        at_once = planes_of(read(model, TurboQuant(bits), IDS))
    wide = [store["scale0"].dtype == torch.float32 for store in later]
    assert wide == [number == 3 for number in range(len(later))]
    for one, other in zip(later, at_once, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].dtype == other[name].dtype for name in one)
        assert all(torch.equal(one[name], other[name]) for name in one)


def by_head() -> TurboQuant:
    widths = dict.fromkeys(range(3), ((2, 4), (4, 3)))
    plan = WidthPlan("llama", config_fingerprint(tiny_model("llama").config), widths)
    return TurboQuant(plan=plan, recent_tokens=16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Compose([Demote(Knorm(0.5)), TurboQuant(4, recent_tokens=16)]),
        lambda: Compose([AdaKV(Knorm(0.5)), TurboQuant(4, recent_tokens=16)]),
        lambda: TurboQuant(2, codebook="trellis"),
        by_head,
    ],
    ids=["demoted", "evicted by head", "trellis", "widths by head"],
)
def test_no_pages_keep_scales_in_float32(make: Callable[[], Any]) -> None:
    cache = read(tiny_model("llama"), make(), IDS)
    dtypes = {plane.dtype for layer in cache.layers for plane in layer.tokens.packed_tensors()}
    assert dtypes == {torch.uint8, torch.float16}


def test_a_refused_context_leaves_an_empty_cache() -> None:
    model, cache = tiny_model("llama", seed=77), DynamicCache()
    with changed(model.model.layers[1].self_attn.k_proj.weight) as weight:
        weight[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match="the keys of layer 1 hold NaN or infinity"):
            read(model, TurboQuant(), IDS, cache)
    assert cache.get_seq_length() == 0 and not any(isinstance(one, PackedLayer) for one in cache.layers)


def test_wrong_queries_are_not_used_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without balance: the weights are 1."""
    plain = planes_of(read(tiny_model("llama"), TurboQuant(3, balance=False), IDS))
    monkeypatch.setattr(queries, "_TOLERANCE", -1.0)
    with pytest.warns(UserWarning, match="are not those in its cache") as caught:
        cache = read(tiny_model("llama"), TurboQuant(3), IDS)
    assert len([one for one in caught if "queries of" in str(one.message)]) == 1
    for layer in cache.layers:
        assert bool((layer.tokens.key_transform.weight == 1).all())
    for one, other in zip(planes_of(cache), plain, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_forward_that_failed_leaves_no_checks_to_the_next() -> None:
    model, press = tiny_model("llama"), TurboQuant(3)
    last = model.model.layers[-1]
    with torch.no_grad(), press(model), warnings.catch_warnings():
        handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.model(IDS, past_key_values=DynamicCache())
        handle.remove()
        cache = DynamicCache()
        model.model(IDS, past_key_values=cache)
    assert {store["scale0"].dtype for store in planes_of(cache)} == {torch.float16}
