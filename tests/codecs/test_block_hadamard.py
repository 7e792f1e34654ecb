"""Integers behind a block Hadamard rotation: the matrix, the codes, and SAW-INT4's arm."""

import pytest
import torch

from quantpress.cache import cache_memory
from quantpress.codecs.block_hadamard import BlockHadamardPages
from quantpress.codecs.uniform import UniformPages
from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import block_hadamard
from quantpress.quantization.transform import ChannelTransform
from tests.presses.reading import read
from tests.tiny_models import HEAD_DIM, prompt, tiny_model

NONE = ChannelTransform()


def matrix(head_dim: int, block: int) -> torch.Tensor:
    """Blocks of Sylvester's Hadamard matrix, whose entries are (-1) ** (ones in i & j), and zeros."""
    ones = [[(i & j).bit_count() for j in range(block)] for i in range(block)]
    rotation = (-1.0) ** torch.tensor(ones).double() / block**0.5
    return torch.block_diag(*[rotation] * (head_dim // block))


@pytest.mark.parametrize(
    ("head_dim", "block", "expected"),
    [(64, 16, 16), (64, None, 64), (80, None, 16), (96, None, 32), (256, None, 128), (8, 1, 1)],
)
def test_code_space_is_rotated_in_blocks(head_dim: int, block: int | None, expected: int) -> None:
    codec = BlockHadamardPages(head_dim, 4, block=block)
    x = torch.randn(3, 5, head_dim)
    rotation = matrix(head_dim, expected)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(head_dim).double())
    torch.testing.assert_close(codec.to_code_space(x), (x.double() @ rotation.T).float())
    torch.testing.assert_close(codec.from_code_space(codec.to_code_space(x)), x)


def test_codes_are_uniform_codes_of_rotated_vectors() -> None:
    codec, plain = BlockHadamardPages(64, 4, block=32), UniformPages(64, 4)
    x = torch.randn(2, 3, 256, 64)
    x[..., 5] *= 30  # the kind of channel that the rotation is for
    planes, expected = codec.encode(x.half(), NONE), plain.encode(codec.to_code_space(x.half().float()), NONE)
    assert all(torch.equal(plane, expected[name]) for name, plane in planes.items())
    assert codec.bits_per_value == plain.bits_per_value == 4.5
    error = codec.decode(planes, NONE, torch.float32) - x
    assert error.norm() < 0.5 * (plain.decode(plain.encode(x, NONE), NONE, torch.float32) - x).norm()


@pytest.mark.parametrize(("head_dim", "block"), [(64, 24), (64, 128), (96, 64), (64, 0)])
def test_wrong_blocks_are_refused(head_dim: int, block: int) -> None:
    with pytest.raises(InvalidInputError, match=f"blocks of {block} channels in heads of {head_dim}"):
        BlockHadamardPages(head_dim, 4, block=block)


def test_the_arm_rotates_keys_alone() -> None:
    cache = read(tiny_model("llama"), block_hadamard(), prompt(512))
    settings = {(type(layer.settings.key_codec), type(layer.settings.value_codec)) for layer in cache.layers}
    assert settings == {(BlockHadamardPages, UniformPages)}
    assert cache_memory(cache).bits_per_value == 4 + 32 / HEAD_DIM  # a minimum and a step in float16
