"""FP8 control: torch's own cast, 8 bits a value, tokens that move, attention over it in a model."""

import pytest
import torch

from quantpress.cache import PackedLayer, cache_memory
from quantpress.codecs.fp8 import Fp8Pages
from quantpress.evaluation.arms import fp8
from quantpress.quantization.transform import ChannelTransform
from tests.presses.reading import read
from tests.tiny_models import prompt, tiny_model

NONE = ChannelTransform()
CODEC = Fp8Pages(64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_numbers_are_those_of_torchs_cast(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 3, 256, 64) * 10 ** torch.linspace(-4, 2, 64)).clamp(-440, 440).to(dtype)
    planes = CODEC.encode(x, NONE)
    assert planes["fp8"].dtype == torch.float8_e4m3fn and planes["fp8"].shape == (2, 3, 2, 128, 64)
    assert torch.equal(CODEC.decode(planes, NONE, dtype), x.to(torch.float8_e4m3fn).to(dtype))


def test_the_numbers_are_the_nearest_of_e4m3_and_saturate() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = every[every.isfinite()].unique()
    x = torch.cat([torch.randn(8188) * 100, torch.tensor([448.1, 500, 1e9, torch.inf])]).view(1, 1, 128, 64)
    x[..., 0] = torch.tensor([449.0, -torch.inf]).repeat(64)
    found = CODEC.decode(CODEC.encode(x, NONE), NONE, torch.float32)
    error = (x.clamp(-448, 448).unsqueeze(-1) - levels).abs().amin(-1)
    assert torch.equal((found - x.clamp(-448, 448)).abs(), error)
    assert found[0, 0, :2, 0].tolist() == [448, -448]


def test_tokens_move_with_their_codes() -> None:
    planes = CODEC.encode(torch.randn(2, 3, 384, 64), NONE)
    tokens = torch.stack([torch.randperm(384)[:256] for _ in range(6)]).view(2, 3, 256)
    moved = CODEC.gather(planes, tokens)
    assert moved["fp8"].dtype == torch.float8_e4m3fn
    expected = CODEC.decode_code_space(planes).gather(2, tokens.unsqueeze(-1).expand(-1, -1, -1, 64))
    assert torch.equal(CODEC.decode_code_space(moved), expected)


def test_a_cache_has_8_bits_a_value() -> None:
    cache = read(tiny_model("llama"), fp8(), prompt(512))
    assert all(isinstance(layer, PackedLayer) and layer.packed_tokens == 512 for layer in cache.layers)
    assert cache_memory(cache).bits_per_value == CODEC.bits_per_value == 8
