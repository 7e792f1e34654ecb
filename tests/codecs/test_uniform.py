"""Plain integers and KIVI's scheme: true to a direct computation, and really as small as they say."""

import pytest
import torch
from transformers import DynamicCache

from quantpress.cache import PackedLayer, cache_memory
from quantpress.codecs.uniform import UniformPages
from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import kivi, plain_integers
from quantpress.quantization.transform import ChannelTransform
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

NONE = ChannelTransform()


def quantized(x: torch.Tensor, bits: int, dim: int, group: int) -> torch.Tensor:
    """Asymmetric min-max quantization of groups along one dimension, in float64, without packing."""
    moved = x.double().movedim(dim, -1)
    parts = moved.reshape(*moved.shape[:-1], -1, group)
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return (((parts - low) / step).round() * step + low).reshape(moved.shape).movedim(-1, dim)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("axis", "dim", "group"), [("token", 3, 64), ("token", 3, 32), ("channel", 2, 32)])
def test_codes_are_those_of_min_max_quantization(bits: int, axis: str, dim: int, group: int) -> None:
    x = torch.randn(2, 3, 256, 64) * torch.rand(64).exp() + 5 * torch.randn(64)
    codec = UniformPages(64, bits, axis, group)
    decoded = codec.decode(codec.encode(x, NONE), NONE, torch.float32)
    expected = quantized(x, bits, dim, group)
    parts = x.movedim(dim, -1).unflatten(-1, (-1, group))
    spread = (parts.amax(-1) - parts.amin(-1)).max()
    # float16 range and step: half an ulp of the lowest value, and of 2**bits - 1 steps
    assert (decoded - x).abs().max() <= spread / (2**bits - 1) / 2 + x.abs().max() * 2**-9
    assert (decoded - expected).abs().mean() < 0.02 * spread / (2**bits - 1) + x.abs().max() * 2**-10


def test_a_constant_group_is_exact() -> None:
    x = torch.full((1, 1, 128, 16), 3.5)
    codec = UniformPages(16, 4)
    assert torch.equal(codec.decode(codec.encode(x, NONE), NONE, torch.float32), x)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_are_counted_from_what_is_stored(axis: str, bits: int) -> None:
    codec = UniformPages(64, bits, axis, 32)
    planes = codec.encode(torch.randn(2, 2, 384, 64), NONE)
    stored = sum(plane.untyped_storage().nbytes() for plane in planes.values())
    assert 8 * stored == codec.bits_per_value * 2 * 2 * 384 * 64
    assert codec.bits_per_value == bits + 1


@pytest.mark.parametrize(("make", "bits"), [(lambda: plain_integers(8), 8), (lambda: plain_integers(4), 4)])
def test_plain_integers_hold_that_many_bits_a_value(make, bits) -> None:
    cache = read(tiny_model("llama"), make(), prompt(1024))
    assert all(isinstance(layer, PackedLayer) and layer.packed_tokens == 1024 for layer in cache.layers)
    assert cache_memory(cache).bits_per_value == bits + 32 / 32  # float16 low and step, head_dim 32


def test_kivi_keeps_its_residual_in_16_bits() -> None:
    cache = read(tiny_model("llama"), kivi(2), prompt(1024))
    layers = cache_memory(cache).layers
    assert all(layer.packed_tokens == 896 and layer.tokens == 1024 for layer in layers)
    heads, dim, float32 = 2, 32, 4  # the tiny model's dtype
    assert {layer.dense_bytes for layer in layers} == {128 * 2 * heads * dim * float32}
    assert {layer.packed_bytes * 8 for layer in layers} == {896 * 2 * heads * dim * (2 + 1)}


def test_generation_reads_the_codes() -> None:
    """At 8 bits the next token's logits are nearly the model's own; at 2 bits they are not."""
    model, ids = tiny_model("llama"), prompt(700)
    step = {"input_ids": prompt(1, seed=3), "position_ids": torch.tensor([[700]])}
    logits = {}
    for name, press in {"none": None, "8": plain_integers(8), "2": kivi(2)}.items():
        with torch.inference_mode():
            logits[name] = model(**step, past_key_values=read(model, press, ids, DynamicCache())).logits
    error = {name: (one - logits["none"]).norm() / logits["none"].norm() for name, one in logits.items()}
    assert 0 < error["8"] < 0.05 < error["2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 3), "3 bits"),
        ((64, 4, "head"), "'head'"),
        ((64, 4, "token", 48), "48"),
        ((64, 4, "channel", 5), "5"),
    ],
)
def test_wrong_codes_are_refused(arguments, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        UniformPages(*arguments)


def test_tokens_of_a_control_do_not_move() -> None:
    codec = UniformPages(16, 4)
    planes = codec.encode(torch.randn(1, 1, 128, 16), NONE)
    with pytest.raises(InvalidInputError, match="cannot be moved"):
        codec.gather(planes, torch.arange(128).view(1, 1, -1))
