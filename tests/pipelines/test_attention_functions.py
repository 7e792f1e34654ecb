"""The attention functions of transformers are the same objects after anything of ours as they were before."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from quantpress.evaluation.divergence.reference import read_reference
from quantpress.pipelines import captured_decoding, disable, enable, patch_attention
from quantpress.presses import Compose, Knorm, SnapKV, TurboQuant
from tests.cache.caches import functions, functions_left_alone
from tests.pipelines.words import ours, text
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

IDS = prompt(300)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


def under_a_press(model: PreTrainedModel) -> None:
    with Compose([SnapKV(0.5), TurboQuant(4)])(model):
        model.generate(IDS, past_key_values=DynamicCache(), **GREEDY)


def over_a_kept_cache(model: PreTrainedModel) -> None:
    before = functions()
    cache = read(model, TurboQuant(4), IDS)
    assert functions() != before  # the press is gone, but its cache may be attended to
    model.generate(torch.cat([IDS, IDS[:, :3]], dim=1), past_key_values=cache, **GREEDY)
    other = copy.deepcopy(cache)
    del cache
    assert functions() != before
    del other
    assert functions() == before


def enabled(model: PreTrainedModel) -> None:
    enable(model, Compose([Knorm(0.3), TurboQuant(4)]))
    model.generate(IDS, **GREEDY)
    disable(model)


def patched(model: PreTrainedModel) -> None:
    before = functions()
    with patch_attention(model, 4):
        model.generate(IDS, **GREEDY)
        assert functions() == before  # wrapped while a forward runs


def patched_beside_a_packed_cache(model: PreTrainedModel) -> None:
    cache = read(model, TurboQuant(4), IDS)
    before = functions()
    with patch_attention(model, 4):
        model(IDS)
    assert functions() == before
    model.generate(torch.cat([IDS, IDS[:, :3]], dim=1), past_key_values=cache, **GREEDY)


def captured_over_plain_layers(model: PreTrainedModel) -> None:
    with captured_decoding(model):
        model.generate(IDS, past_key_values=DynamicCache(), **GREEDY)


def evaluated(model: PreTrainedModel) -> None:
    with torch.no_grad():
        assert len(read_reference(model, IDS, 250, queries=4).attention) == 3


def failed(model: PreTrainedModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    try:
        for use in (under_a_press, enabled, patched, captured_over_plain_layers, evaluated):
            with pytest.raises(RuntimeError, match="on purpose"):
                use(model)
            disable(model) if use is enabled else None
    finally:
        handle.remove()


USES: list[Callable[[PreTrainedModel], None]] = [
    under_a_press,
    over_a_kept_cache,
    enabled,
    patched,
    patched_beside_a_packed_cache,
    captured_over_plain_layers,
    evaluated,
    failed,
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use", USES)
def test_after_one_use(use: Callable[[PreTrainedModel], None], attention: str) -> None:
    model = copy.deepcopy(tiny_model("llama", attention, seed=16))  # others have left hooks on the usual one
    with functions_left_alone():
        use(model)


def test_after_a_pipeline_and_a_context() -> None:
    with functions_left_alone() as before:
        pipe = ours()
        pipe(text(300), questions=["w1", "w2"], press=TurboQuant(4), max_new_tokens=4)
        assert functions() == before
        context = pipe.read(text(300), press=TurboQuant(4))
        assert functions() != before
        del context
        assert functions() == before


def test_after_uses_in_several_threads() -> None:
    models = [copy.deepcopy(tiny_model(family)) for family in ("llama", "qwen3", "llama", "qwen3")]
    uses = [under_a_press, enabled, patched_alone, evaluated]

    def work(index: int) -> None:
        for turn in range(3):
            uses[(index + turn) % len(uses)](models[index])

    with functions_left_alone(), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4


def patched_alone(model: PreTrainedModel) -> None:
    with patch_attention(model, 4) as patch:
        model.generate(IDS, **GREEDY)
    assert patch.record.calls


def test_of_nested_uses_the_last_one_that_ends_puts_everything_back() -> None:
    first, second, third = (copy.deepcopy(tiny_model("llama")) for _ in range(3))
    with functions_left_alone() as before:
        enable(first, 4)
        with TurboQuant(4)(second):
            cache = DynamicCache()
            with torch.no_grad(), patch_attention(third) as patch:
                second.model(input_ids=IDS, past_key_values=cache)
                evaluated(third)
            first.generate(IDS, **GREEDY)
        disable(first)
        assert len(patch.record.calls) == 3 and functions() != before
        del cache
        assert functions() == before
