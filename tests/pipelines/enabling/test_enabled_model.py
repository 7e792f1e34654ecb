"""What `enable` leaves alone, what `disable` puts back, and what is refused."""

import copy
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    TextGenerationPipeline,
)

from quantpress.cache import host
from quantpress.errors import InvalidInputError, UnsupportedModelError
from quantpress.pipelines.capture.captured import captured_decoding
from quantpress.pipelines.enabling.enable import disable, enable
from quantpress.pipelines.method_replacement import MethodReplacement
from quantpress.pipelines.press_argument import enabled_press
from quantpress.presses import AdaKV, Compose, Decoding, Knorm, TurboQuant
from quantpress.presses.models.attention import attention_modules
from tests.pipelines.enabling.enabled import FULL, GREEDY, IDS, NO_END, SNAP, TOKENS, packed, state
from tests.pipelines.words import ours, text, word_tokenizer
from tests.presses.reading import lossless
from tests.tiny_models import tiny_model
from tests.versions import kvpress_names

# Pipelines


def test_pipelines_use_it() -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    context = text(400)
    plain = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = plain(context, **options)
    press = Compose([SNAP, TurboQuant(3, recent_tokens=16)])
    answer = ours()(context, question="w1 w2", press=press, report=True)
    with enable(model, lossless()):
        assert plain(context, **options) == expected
    uncompressed = ours().read(context)
    with enable(model, press):
        got = ours()(context, question="w1 w2", report=True)
        read = ours().read(context)
        assert read.press is press and packed(read.cache) == [True] * 3
        assert ours()(read, question="w1 w2")["answer"] == got["answer"]
        assert not any(packed(uncompressed.cache))
        before = ours()(uncompressed, question="w1 w2")["answer"]
    assert before == ours()(uncompressed, question="w1 w2")["answer"]
    with enable(model, press):
        unpressed = plain(context, **options)
    assert got["answer"] == answer["answer"]
    assert got["report"].resident_bytes == answer["report"].resident_bytes
    assert unpressed != expected


# What is left alone


def test_caches_of_the_caller_and_other_forwards_are_left_alone() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    expected = model.generate(IDS, **GREEDY)
    logits = model(IDS).logits
    with enable(model, Compose([SNAP, TurboQuant(2)])):
        assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)
        assert type(cache) is DynamicCache and cache.get_seq_length() == TOKENS + 9
        assert not any(packed(cache))
        assert torch.equal(model.generate(IDS, use_cache=False, **GREEDY), expected)
        assert torch.equal(model(IDS).logits, logits)


def test_disable_restores_everything() -> None:
    model = tiny_model("llama")
    model.generate(IDS, **GREEDY)  # kvpress leaves an attribute at the first prefill
    before, answer = state(model), model.generate(IDS, **GREEDY)
    for press in (
        4,
        Compose([SNAP, TurboQuant]),
        Compose([AdaKV(Knorm(0.5)), TurboQuant]),
        Decoding(Knorm()),
    ):
        handle = enable(model, press)
        assert state(model) != before
        model.generate(IDS, **GREEDY)
        disable(model)
        assert state(model) == before
        handle.__exit__()  # leaving a context that was undone by hand
    disable(model)
    assert torch.equal(model.generate(IDS, **GREEDY), answer)


@pytest.mark.parametrize("press", [4, SNAP, Decoding(Knorm())], ids=["quantizer", "evictor", "decoding"])
def test_exceptions_pass_through(press: Any) -> None:
    """During a prefill, and later."""
    model = tiny_model("llama")
    model.generate(IDS, **GREEDY)
    before = state(model)
    with pytest.raises(RuntimeError, match="on purpose"), enable(model, press):
        inside = state(model)
        handle = model.model.layers[1].mlp.register_forward_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model.generate(IDS, **GREEDY)
        handle.remove()
        assert state(model) == inside
        assert model.generate(IDS, **GREEDY).shape[1] == TOKENS + 10
        model.generate(IDS, logits_processor=[_fail], **GREEDY)
    assert state(model) == before


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_models_are_independent() -> None:
    first, second = tiny_model("llama"), tiny_model("qwen3")
    with enable(first, lossless()), enable(second, SNAP):
        caches = [model.generate(IDS, **FULL).past_key_values for model in (first, second)]
    assert packed(caches[0]) == [True] * 3 and packed(caches[1]) == [False] * 3
    assert caches[1].layers[0].get_seq_length() == TOKENS // 2 + 9


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_enabled_by_itself(way: str) -> None:
    model = tiny_model("llama")
    with enable(model, Compose([SNAP, TurboQuant(3)])):
        expected = model.generate(IDS, **GREEDY)
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert "forward" not in vars(model)
    assert all(replaced.owner is other for replaced in vars(other)["_quantpress_enabled"]._replaced)
    assert vars(other)["forward"].original.__self__ is other
    for layer in model.model.layers:  # the copy does not use the original
        layer.mlp.forward = _fail
    try:
        assert torch.equal(other.generate(IDS, **GREEDY), expected)
    finally:
        for layer in model.model.layers:
            del layer.mlp.forward
    disable(other)
    assert not {"forward", "generate", "_prepare_cache_for_generation"} & set(vars(other))


def test_saved_model_is_the_plain_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with enable(model, 4):
        model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert enabled_press(loaded) is None
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


# Refusals


def test_enabled_twice() -> None:
    model = tiny_model("llama")
    with enable(model, 4), pytest.raises(InvalidInputError, match=r"enabled already, with Compose.*disable"):
        enable(model, 3)
    assert enabled_press(model) is None


def test_something_on_top_is_not_torn_off() -> None:
    model = tiny_model("llama")
    enable(model, 4)
    with captured_decoding(model), pytest.raises(InvalidInputError, match="forward was replaced again"):
        disable(model)
    assert enabled_press(model) is not None
    disable(model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("press", "options", "reason"),
    [
        (4, {"cache_implementation": "static"}, "StaticCache here .*'static'.*cannot be compressed"),
        (4, {"prefill_chunk_size": 64}, "prefill_chunk_size=64 would show the press"),
        (SNAP, {"prompt_lookup_num_tokens": 3}, "might evict them"),
        (Decoding(Knorm()), {"num_beams": 2}, "acts during decoding"),
        (4, {"cache_implementation": "paged"}, "continuous batching"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_settings_that_rule_it_out(press: Any, options: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama")
    with enable(model, press), pytest.raises(InvalidInputError, match=reason):
        model.generate(IDS, **GREEDY, **NO_END, **options)
    assert not vars(model).keys() & {"forward", "generate"}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("minimax", "cache of its own kind"),
        ("bloom", "does not call attention through"),
        ("mistral_sliding", "every layer of Mistral.* sliding window"),
    ],
)
def test_models_that_cannot_be_packed_are_refused_at_once(family: str, reason: str) -> None:
    model = tiny_model(family, "eager" if family == "bloom" else "sdpa")
    with pytest.raises(UnsupportedModelError, match=reason):
        enable(model, 4)
    assert "_quantpress_enabled" not in vars(model) and "forward" not in vars(model)


@pytest.mark.skipif(host.HOLDS_STATES, reason="a DynamicCache of this transformers holds their states")
@pytest.mark.parametrize("family", ["jamba", "falcon_h1"])
def test_a_cache_of_another_kind_is_not_passed_over(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match="cache of its own"), enable(model, 4):
        model.generate(IDS, **GREEDY)


@pytest.mark.parametrize(
    ("give", "error", "reason"),
    [
        (
            lambda model: enable(model.model, 4),
            UnsupportedModelError,
            "not a transformers model that generates",
        ),
        (lambda model: enable(nn.Linear(2, 2), 4), UnsupportedModelError, "not a transformers model"),
        (lambda model: enable(model, SNAP, bits=3), InvalidInputError, "bits given beside SnapKV"),
        (lambda model: enable(model, "Tiny(3)"), InvalidInputError, "Tiny"),
        (lambda model: enable(model, 17), InvalidInputError, "17"),
        (lambda model: enable(model, object()), InvalidInputError, "is no press"),
    ],
    ids=["backbone", "no model", "options", "preset", "bits", "object"],
)
def test_wrong_arguments(give: Any, error: type[Exception], reason: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(error, match=reason):
        give(model)
    assert enabled_press(model) is None


def test_a_method_of_the_object_s_own_is_put_back() -> None:
    """After `device_map`, the model's forward is an attribute of the object."""
    layer = nn.Linear(2, 2)
    own = layer.forward = lambda x: x + 1  # type: ignore[method-assign]
    outer = MethodReplacement(layer, "forward", lambda forward, x: 2 * forward(x))
    inner = MethodReplacement(layer, "forward", lambda forward, x: 3 * forward(x))
    assert float(layer(torch.tensor(1.0))) == 12
    with pytest.raises(InvalidInputError, match=r"Linear\.forward was replaced again"):
        outer.undo()
    inner.undo()
    outer.undo()
    assert vars(layer)["forward"] is own


def test_masks_that_an_earlier_press_left_on_the_model_are_not_of_this_cache() -> None:
    """kvpress's head-wise presses leave them there until the next prefill through plain attention."""
    model = copy.deepcopy(tiny_model("llama"))
    with enable(model, 4):
        expected = model.generate(IDS, **GREEDY)
        press = kvpress.AdaKVPress(kvpress.KnormPress(0.5))
        with kvpress_names(model, press), press(model):
            model(IDS.repeat(1, 2), past_key_values=DynamicCache())
        left = [module.masked_key_indices for module in attention_modules(model)]
        assert all(mask is not None for mask in left)
        assert torch.equal(model.generate(IDS, **GREEDY), expected)
        assert [module.masked_key_indices for module in attention_modules(model)] == left


def test_a_second_block_over_what_was_disabled_is_refused() -> None:
    """It would compress nothing, and say nothing."""
    model = tiny_model("llama")
    with enable(model, 4) as state:
        pass
    with pytest.raises(InvalidInputError, match=r"disabled before.*call enable\(model, ...\) again"), state:
        pytest.fail("entered")
    with enable(model, 4):
        pass


@pytest.mark.parametrize("given", [None, "model"])
def test_what_is_no_model_is_named(given: Any) -> None:
    message = f"a {type(given).__name__} is no model"
    for use in (disable, TurboQuant(4), SNAP):
        with pytest.raises(UnsupportedModelError, match=message), ExitStack() as stack:
            stack.enter_context(use(given))
