"""`TurboQuant(plan=...)`: each layer has the plan's widths, and nothing else may give widths."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantpress import enable
from quantpress.cache import WidthPlan, cache_memory
from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.codecs.head_groups import HeadGroups
from quantpress.codecs.raw import RawPages
from quantpress.errors import CacheFileError, InvalidInputError
from quantpress.evaluation.sizing.memory_plan import Planner
from quantpress.evaluation.sizing.model_outline import ModelOutline
from quantpress.pipelines.contexts.cached_context import CachedContext
from quantpress.presses import AdaKV, Compose, Demote, Knorm, TurboQuant
from quantpress.presses.expression import parse_press
from tests.pipelines.words import ours, text
from tests.tiny_models import prompt, tiny_model

WIDTHS = {0: (4, 2), 1: (1, 8), 2: (3, 2)}
BY_HEAD: dict[int, Any] = {0: ((4, 2), 2), 1: ((1, 1), (8, 2)), 2: (3, 2)}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    plan(WIDTHS).save(path)
    return str(path)


def plan(widths: dict[int, Any], family: str = "llama") -> WidthPlan:
    """A plan for a tiny model."""
    return WidthPlan(family, config_fingerprint(tiny_model(family).config), widths)


def stored(layers: list[Any]) -> list[tuple[int, int]]:
    """Key and value bits of packed layers."""
    both = [(layer.settings.key_codec.spec.bits, layer.settings.value_codec.spec.bits) for layer in layers]
    return both


def test_each_layer_has_its_widths_wherever_the_press_is_given(file: str) -> None:
    pipe, wanted = ours(), list(WIDTHS.values())
    press = f"TurboQuant(plan={file!r}, recent_tokens=16)"
    context = pipe.read(text(400), press=press)
    assert stored(context.cache.layers) == wanted
    made = parse_press(press)
    assert isinstance(made, TurboQuant) and made.plan == plan(WIDTHS) and made.bits is None
    with enable(tiny_model("llama"), made) as state:
        assert repr(state.press) == f"Compose(TurboQuant(recent_tokens=16, plan={file!r}))"
    assert parse_press(repr(state.press)[8:-1]) == made
    outline = ModelOutline.of("tiny", tiny_model("llama"))
    planned = Planner(outline, made).plan(context.token_ids.shape[1]).cache
    assert planned == cache_memory(context.cache)


def test_heads_have_their_widths_wherever_the_press_is_given(tmp_path: Path) -> None:
    """In the pipeline, under `enable`, in planned bytes, and in a file, which another plan does not load."""
    pipe, model, path = ours(), tiny_model("llama"), tmp_path / "context"
    press = TurboQuant(plan=plan(BY_HEAD), recent_tokens=16)
    context = pipe.read(text(400), press=press)
    keys, values = context.cache.layers[0].settings.key_codec, context.cache.layers[1].settings.value_codec
    assert keys.heads == ((0,), (1,)) and [one.spec.bits for one in keys.codecs] == [4, 2]
    assert [one.spec.bits for one in values.codecs] == [8, 2]
    planned = Planner(ModelOutline.of("tiny", model), press).plan(context.token_ids.shape[1]).cache
    assert planned == cache_memory(context.cache)
    context.save(path)
    again = CachedContext.load(path, model, press=press)
    assert pipe(again, question="w1")["answer"] == pipe(context, question="w1")["answer"]
    other = replace(press, plan=plan({**BY_HEAD, 0: ((4, 3), 2)}))
    with pytest.raises(CacheFileError, match=r"layer 0: .*key group 1 bits was 2, is 3"):
        CachedContext.load(path, model, press=other)
    ids = prompt(400)
    with enable(model, press):
        enabled = model.generate(ids, max_new_tokens=8, return_dict_in_generate=True)
    assert cache_memory(enabled.past_key_values).ratio > 1
    assert TurboQuant(plan=plan(BY_HEAD)).bits_per_value(64) == pytest.approx((2.5 + 3 + 2.5) / 3 + 1 / 4)


def test_groups_without_loss_give_the_tokens_of_an_uncompressed_cache() -> None:
    """The pipeline, and `generate` with beams, over pages of two heads in groups of their own."""

    def codec(head_dim: int, role: str, layer: int) -> HeadGroups:
        return HeadGroups(((1,), (0,)), (RawPages(head_dim, 32), RawPages(head_dim)))

    press, pipe, model = TurboQuant(codec=codec, recent_tokens=16), ours(), tiny_model("llama")
    answers = [pipe(text(400), questions=["w1 w2", "w3"], press=one)["answers"] for one in (None, press)]
    assert answers[0] == answers[1]
    ids, options = prompt(300), {"max_new_tokens": 110, "num_beams": 2, "do_sample": False}
    plain = model.generate(ids, **options)
    with enable(model, press):
        assert torch.equal(model.generate(ids, **options), plain)
    with pytest.raises(InvalidInputError, match="evicting different numbers of tokens"):
        pipe(text(400), question="w1", press=Compose([AdaKV(Knorm(0.5)), press]))


def test_bits_are_those_of_the_plan(file: str) -> None:
    pairs = [TurboQuant(key_bits=k, value_bits=v).bits_per_value(64) for k, v in WIDTHS.values()]
    assert TurboQuant(plan=file).bits_per_value(64) == pytest.approx(sum(pairs) / 3)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"key_bits": 3},
        {"value_bits": 3},
        {"layer_bits": {0: 16}},
        {"boundary_layers": 1},
        {"codec": lambda dim, role, layer: RawPages(dim)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_widths_beside_a_plan_are_refused(options: dict[str, Any], file: str) -> None:
    (name,) = options
    with pytest.raises(InvalidInputError, match=rf"{name}=.* was given beside plan='.*plan.json', which has"):
        TurboQuant(**options, plan=file)


def test_a_plan_replaces_the_widths_of_a_preset_and_nothing_else(file: str) -> None:
    preset, press = TurboQuant.preset("quality"), TurboQuant.preset("quality", plan=file)
    assert press == replace(preset, bits=None, key_bits=None, value_bits=None, plan=file)
    assert replace(press, seed=3).plan == plan(WIDTHS)
    assert TurboQuant() == TurboQuant(4) and TurboQuant().bits == 4
    with pytest.raises(InvalidInputError, match="plan is 3; give the path"):
        TurboQuant(plan=3)  # type: ignore[arg-type]
    with pytest.raises(CacheFileError, match=r"nowhere\.json cannot be read as a plan"):
        parse_press("TurboQuant(plan='nowhere.json')")


def test_demoted_tokens_have_the_widths_of_demote(file: str) -> None:
    press = Compose([Demote(Knorm(0.5), bits=1), TurboQuant(plan=file, recent_tokens=16)])
    context = ours().read(text(700), press=press)
    assert stored(context.cache.layers) == list(WIDTHS.values())
    assert [layer.tokens.demoted.key_codec.spec.bits for layer in context.cache.layers] == [1] * 3  # type: ignore


def test_a_plan_of_another_model_is_refused_before_anything_is_read(file: str) -> None:
    press = TurboQuant(plan=file)
    for use in (
        lambda: enable(tiny_model("qwen2"), press),
        lambda: ours("qwen2").read(text(400), press=press),
        lambda: Planner(ModelOutline.of("tiny", tiny_model("qwen2")), press),
    ):
        with pytest.raises(CacheFileError, match="has widths for llama, not for qwen2"):
            use()
    short = TurboQuant(plan=plan({0: (2, 2)}))
    with pytest.raises(InvalidInputError, match=r"the plan has no widths of layer 1 \(it has 0\)"):
        enable(tiny_model("llama"), short)


def test_a_saved_context_is_refused_under_another_plan(file: str, tmp_path: Path) -> None:
    press, saved = TurboQuant(plan=file, recent_tokens=16), tmp_path / "context"
    ours().read(text(400), press=press).save(saved)
    CachedContext.load(saved, tiny_model("llama"), press=press)
    other = replace(press, plan=plan({**WIDTHS, 1: (2, 8)}))
    with pytest.raises(CacheFileError, match=r"layer 1: key bits was 1, is 2"):
        CachedContext.load(saved, tiny_model("llama"), press=other)
