"""Presses on a model that several processes share, without the processes: rules, and what presses see."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kvpress
import pytest
import torch
from transformers import PreTrainedModel

from quantpress.cache import WidthPlan
from quantpress.cache.ranks import kv_heads, ranks_of
from quantpress.errors import UnsupportedModelError
from quantpress.presses import AdaKV, ChunkKV, Compose, Decoding, KVzip, LeverageScore, SnapKV, TurboQuant
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.models.eligibility import LAYERED
from quantpress.presses.models.eligibility import why_not as not_for_model
from quantpress.presses.ranks import RULES, own_heads, why_not
from tests.tiny_models import tiny_model

CASES: dict[str, Callable[[], Any]] = {
    "{press} decides": lambda: Compose([KVzip(), TurboQuant()]),
    "{press} has a plan of widths by head": lambda: TurboQuant(plan=WidthPlan("", {}, {0: ((2, 3), 2)})),
    "{press} compares heads": lambda: AdaKV(LeverageScore(0.5)),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.message[:30])
def test_every_rule_has_a_case(rule: Any) -> None:
    (press,) = [make() for beginning, make in CASES.items() if rule.message.startswith(beginning)]
    assert why_not(press) == [rule.reason(press)]


@pytest.mark.parametrize(
    "press", [kvpress.TOVAPress(0.5), Decoding(kvpress.TOVAPress()), kvpress.KVgradPress(0.5)]
)
def test_presses_that_need_all_heads(press: Any) -> None:
    assert "numbers of all heads" in why_not(press)[0]


def shared(count: int, **attributes: Any) -> PreTrainedModel:
    """A model that looks as one process of several sees it; nothing can be exchanged."""
    model = copy.deepcopy(tiny_model("llama"))
    model._tp_size = count
    model._device_mesh = SimpleNamespace(get_local_rank=lambda: 1, get_group=lambda: None)
    for module in attention_modules(model):
        for name in ("q_proj", "k_proj"):
            getattr(module, name)._hf_tp_plan = attributes.get("plan", "colwise")
    return model


def test_presses_see_the_heads_of_their_process() -> None:
    model = shared(2)
    modules: Any = attention_modules(model)
    press = Compose([AdaKV(SnapKV(0.5)), TurboQuant()])
    with own_heads(press, model), own_heads(press.presses[0], model):
        config = modules[0].config
        assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
        assert config.head_dim == model.config.head_dim and kv_heads(model) == 2
        assert {"score", "compress"} <= vars(press.presses[0].press).keys()
    assert all(module.config is model.config for module in modules)
    assert not {"score", "compress"} & {*vars(press.presses[0]), *vars(press.presses[0].press)}


def test_heads_that_every_process_has_are_not_divided() -> None:
    model = shared(2, plan="colwise_gather_output")
    with own_heads(KVzip(), model):
        assert attention_modules(model)[0].config is model.config


def test_slots_that_adakv_names_are_those_of_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of both processes decide together; a short context of ChunkKV is left to the press inside."""
    model, press = shared(2), AdaKV(kvpress.KnormPress(0.5), alpha_safeguard=0)
    module: Any = attention_modules(model)[0]
    other, keys = (
        torch.arange(2.0, 10.0).neg()[None, None],
        torch.ones(1, 1, 8, 32) * torch.arange(1.0, 9.0)[:, None],
    )
    monkeypatch.setattr(
        "quantpress.cache.ranks.Ranks.gathered", lambda self, one, dim: torch.cat([other, one], dim)
    )
    with own_heads(press, model):
        press.compress(module, torch.empty(1, 8, 128), keys, keys, None, {})
    _, head, slot = module.masked_key_indices
    scores = torch.cat([other, -keys.norm(dim=-1)], 1).flatten()
    lowest = scores.topk(8, largest=False).indices
    assert head.unique().tolist() == [0]
    assert sorted(slot.tolist()) == sorted(int(one) - 8 for one in lowest if one >= 8)
    short = ChunkKV(kvpress.KnormPress(0.5))
    with own_heads(short, model):
        assert short.compress(module, torch.empty(1, 8, 128), keys, keys, None, {})[0].shape[1] == 1


class _Mesh(dict[str, Any]):
    """Of several dimensions, as newer versions of transformers have it."""

    ndim = 3


def test_a_model_is_refused_that_processes_cannot_share() -> None:
    said = "LlamaForCausalLM has 2 KV heads, which 4 processes cannot share.*one of 1, 2$"
    with pytest.raises(UnsupportedModelError, match=said), SnapKV(0.5)(shared(4)):
        pass
    model = shared(2)
    model.lm_head.weight.device_mesh = None  # as a DTensor has it
    model._device_mesh = _Mesh(tp=model._device_mesh)
    (reason,) = not_for_model(model, LAYERED)
    assert "into DTensors" in reason


def test_one_process_has_no_ranks() -> None:
    assert ranks_of(tiny_model("llama")) is None and ranks_of(shared(1)) is None
