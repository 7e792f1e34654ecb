"""`captured_decoding` over layers that nothing packs gives the tokens of transformers' layers."""

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantpress.cache import PackedLayer, continue_inputs
from quantpress.cache.fixed.plain import BufferedLayer
from quantpress.pipelines.attention_masks import fitted_masks
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.rollback import context_rollback
from quantpress.presses import Compose, PyramidKV, SnapKV, TurboQuant
from tests.tiny_models import prompt, tiny_model
from tests.versions import LATENT_CACHE

NEW_TOKENS = 70  # more than once round a window of 64
FEW_TOKENS = 24  # where no window goes round, every step after the first is like the one before
NOT_ROUND = ("gpt_oss", "qwen2_sliding")  # layers like those of the others, whose window goes round here
SNAP = {"window_size": 16}


def generate(
    model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache, **arguments: Any
) -> torch.Tensor:
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, **arguments}
    arguments.setdefault("attention_mask", torch.ones_like(ids))
    tokens: torch.Tensor = model.generate(ids, past_key_values=cache, **arguments)
    return tokens


SLIDING, PLAIN = True, False


@pytest.mark.parametrize(
    ("family", "attention", "tokens", "configured"),
    [
        ("llama", "sdpa", 20, PLAIN),
        ("gpt_neox", "sdpa", 300, PLAIN),
        ("deepseek_v3", "eager", 300, PLAIN),
        ("gemma2", "sdpa", 20, SLIDING),
        ("gemma2", "eager", 63, SLIDING),
        ("gemma3", "sdpa", 63, SLIDING),
        ("gemma3", "sdpa", 300, SLIDING),
        ("gpt_oss", "eager", 300, SLIDING),
        ("qwen2_sliding", "sdpa", 300, SLIDING),
        ("mistral_sliding", "sdpa", 20, SLIDING),
        ("mistral_sliding", "sdpa", 300, SLIDING),
        ("mistral_sliding", "sdpa", 300, PLAIN),
    ],
    ids=lambda value: ("plain_layers", "sliding_layers")[value] if isinstance(value, bool) else str(value),
)
def test_tokens_of_transformers_layers(family: str, attention: str, tokens: int, configured: bool) -> None:
    """Before the window is full, as it fills, and long after. The cache can be continued afterwards."""
    if family == "deepseek_v3" and LATENT_CACHE:
        pytest.skip("this transformers caches latents, of which no step is captured")
    model = tiny_model(family, attention)
    new = NEW_TOKENS if configured and family not in NOT_ROUND else FEW_TOKENS
    cache = DynamicCache(config=model.config) if configured else DynamicCache()
    ids = prompt(tokens, batch=2)
    with captured_decoding(model) as steps:
        got = generate(model, ids, cache, max_new_tokens=new)
    plain = DynamicCache(config=model.config) if configured else DynamicCache()
    assert torch.equal(got, generate(model, ids, plain, max_new_tokens=new))
    assert steps.eager_steps == new - 1 and got.unique().numel() > 20
    assert {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    for one, two in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.keys, two.keys, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.values, two.values, rtol=1e-3, atol=1e-3)
    rest = torch.cat([got, prompt(9, batch=2, seed=5)], dim=1)
    assert torch.equal(
        generate(model, rest, cache, max_new_tokens=20), generate(model, rest, plain, max_new_tokens=20)
    )


@pytest.mark.parametrize("configured", [True, False], ids=["sliding_layers", "plain_layers"])
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_beside_packed_layers(family: str, configured: bool) -> None:
    """Layer 0 has a sliding window; layer 1 is not packed."""
    model, ids = tiny_model(family, "eager" if family == "gpt_oss" else "sdpa"), prompt(300)
    answers, new = [], NEW_TOKENS if configured and family not in NOT_ROUND else FEW_TOKENS
    for captured in (False, True):
        cache = DynamicCache(config=model.config) if configured else DynamicCache()
        with torch.no_grad(), TurboQuant(bits=4, recent_tokens=16, layer_bits={1: 16})(model):
            model(ids[:, :-1], past_key_values=cache)
        assert [isinstance(layer, PackedLayer) for layer in cache.layers] == [False, False, True]
        with captured_decoding(model) if captured else nullcontext() as steps:
            answers.append(generate(model, ids, cache, max_new_tokens=new))
    assert torch.equal(*answers)
    assert steps is not None and steps.eager_steps == new  # the last token of the prompt is one


PRESSES: dict[str, Any] = {
    "snapkv": lambda: Compose([SnapKV(0.4, **SNAP)]),
    "pyramidkv": lambda: Compose([PyramidKV(0.4, **SNAP)]),
    "gemma3_packed": lambda: Compose([SnapKV(0.4, **SNAP), TurboQuant(bits=3, recent_tokens=16)]),
}


@pytest.mark.parametrize("press", PRESSES)
def test_after_an_eviction(press: str) -> None:
    model = tiny_model("gemma3" if press.startswith("gemma3") else "llama")
    question, outputs = prompt(7, seed=3), []
    for captured in (False, True):
        cache = DynamicCache()
        with torch.no_grad(), PRESSES[press]()(model):
            model.model(input_ids=prompt(700), past_key_values=cache)
        inputs = continue_inputs(cache, question)
        ids = inputs.pop("input_ids")
        with (
            fitted_masks(model, cache),
            captured_decoding(model) if captured else nullcontext() as steps,
        ):
            outputs.append(generate(model, ids, cache, max_new_tokens=FEW_TOKENS, **inputs))
    assert torch.equal(*outputs)
    assert steps is not None and steps.eager_steps == FEW_TOKENS - 1


def test_questions_about_one_context() -> None:
    """`context_rollback` removes an answer from layers at fixed addresses."""
    model, ids = tiny_model("gemma3"), prompt(200)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
    before = [(layer.keys, layer.values, layer.get_seq_length()) for layer in cache.layers]
    expected = [
        generate(model, torch.cat([ids, prompt(5, seed=seed)], 1), DynamicCache(config=model.config))
        for seed in range(2)
    ]
    with captured_decoding(model, new_tokens=200) as steps:
        for seed in range(2):
            with context_rollback(cache, model):
                got = generate(model, torch.cat([ids, prompt(5, seed=seed)], 1), cache)
                assert any(isinstance(layer, BufferedLayer) for layer in cache.layers)
            assert torch.equal(got, expected[seed])
            for layer, (keys, values, length) in zip(cache.layers, before, strict=True):
                assert layer.keys is keys and layer.values is values and layer.get_seq_length() == length
    assert steps.eager_steps == 2 * (NEW_TOKENS - 1)


def test_a_step_compiles_as_one_graph(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    request.addfinalizer(torch._dynamo.reset)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = tiny_model("gemma3")
    for seed in (0, 1):
        ids = prompt(120, seed=seed)  # the window begins anew after 8 tokens
        expected = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=FEW_TOKENS)
        with captured_decoding(model, compile=True) as steps:
            got = generate(model, ids, DynamicCache(config=model.config), max_new_tokens=FEW_TOKENS)
        assert torch.equal(got, expected) and steps.eager_steps == FEW_TOKENS - 1
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
