"""Arms of one budget take its bytes, measured, and keep the tokens that they say."""

import copy

import pytest
import torch
from transformers import DynamicCache

from quantpress.cache import cache_memory
from quantpress.errors import InvalidInputError
from quantpress.evaluation.equal_bytes import EVERY_TOKEN, PRESSES, Shape, grid_arms
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

CONTEXT = 1200


@pytest.fixture(scope="module")
def half():
    """The tiny model with a cache of 16 bits."""
    return copy.deepcopy(tiny_model("llama")).bfloat16()


@pytest.mark.parametrize(
    ("press", "wide"), [*((press, False) for press in PRESSES), ("SnapKV", True)], ids=str
)
def test_measured_bytes_are_those_of_the_budget(half, press, wide):
    """Of the model's own dtype: 16 bits, or 32."""
    model = tiny_model("llama") if wide else half
    shape = Shape.of(model.config, CONTEXT, model.dtype)
    whole = CONTEXT * shape.layers * shape.kv_heads * shape.head_dim * 2 * (4 if wide else 2)
    assert shape.bytes(CONTEXT, 16) == whole
    arms = grid_arms(shape, [press], (16, 4, 2), (1 / 4,))
    assert sum(f"{32 if wide else 16} bits" in arm.name for arm in arms) == 1
    for arm in arms:
        cache = read(model, arm.make(), prompt(CONTEXT), DynamicCache())
        assert {layer.get_seq_length() for layer in cache.layers} == {arm.tokens}
        memory = cache_memory(cache)
        assert memory.total_bytes == shape.bytes(arm.tokens, arm.bits)
        assert memory.total_bytes <= whole / 4
        if arm.press != EVERY_TOKEN:
            assert memory.total_bytes > 0.9 * whole / 4


def test_fewer_bits_keep_more_tokens():
    shape = Shape(layers=30, kv_heads=3, head_dim=64, context=4096)
    for budget in (1 / 4, 1 / 8, 1 / 16):
        kept = [shape.tokens(budget, bits) for bits in (16, 8, 4, 3, 2)]
        assert kept[0] == 4096 * budget
        assert kept == sorted(kept)
    assert shape.tokens(1 / 8, 4) / 512 == pytest.approx(16 / 4.25, rel=0.15)


def test_one_token_more_would_be_too_much():
    shape = Shape(2, 2, 32, 600)
    for bits in (16, 4):
        tokens = shape.tokens(1 / 3, bits)
        room = shape.bytes(600, 16) / 3
        assert shape.bytes(tokens, bits) <= room
        assert all(shape.bytes(more, bits) > room for more in range(tokens + 1, 601))


def test_arms_have_names_of_their_own_and_what_fits_whole_is_one_arm():
    shape = Shape(2, 2, 64, 2048)
    arms = grid_arms(shape, ["SnapKV", "Knorm"], (16, 2), (1 / 2, 1 / 4))
    assert len({arm.name for arm in arms}) == len(arms)
    whole = [arm for arm in arms if arm.press == EVERY_TOKEN]
    assert [(arm.bits, arm.tokens) for arm in whole] == [(2, 2048)]
    assert sum(arm.bits == 16 for arm in arms) == 4


@pytest.mark.parametrize(("press", "budget"), [("NoPress", 0.5), ("SnapKV", 1e-6)])
def test_what_cannot_be_is_refused(press, budget):
    with pytest.raises(InvalidInputError, match=r"NoPress|1e-06"):
        grid_arms(Shape(2, 2, 64, 512), [press], (16,), (budget,))


@pytest.mark.parametrize("family", ["llama", "gemma3", "multi_head"])
def test_the_shape_is_that_of_the_cache(family):
    model = tiny_model(family)
    shape = Shape.of(model.config, 50)
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=prompt(50), past_key_values=cache)
    assert shape.layers == len(cache.layers)
    assert cache.layers[0].keys.shape == (1, shape.kv_heads, 50, shape.head_dim)
