"""Moments kept while vectors arrive are those of all vectors together."""

import pytest
import torch

from quantpress.errors import EmptyContextError, InvalidInputError, NonFiniteError
from quantpress.quantization.budget import split_channels
from quantpress.quantization.running_moments import RunningMoments
from quantpress.quantization.transform import key_statistics, value_statistics


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_those_of_numpy(offset: float) -> None:
    """Far from zero too, where sums of squares lose everything."""
    x = torch.randn(700, 16, dtype=torch.float64) * torch.rand(16).double() + offset
    moments = RunningMoments(16)
    for part in x.split([1, 0, 299, 37, 363]):
        moments.update(part)
    array = x.numpy()
    assert moments.count == 700
    assert torch.allclose(moments.mean, torch.from_numpy(array.mean(0)))
    assert torch.allclose(moments.variance, torch.from_numpy(array.var(0)), rtol=1e-6)
    assert torch.allclose(moments.energy, torch.from_numpy((array**2).mean(0)))


def test_any_shape_and_dtype() -> None:
    x = torch.randn(2, 3, 40, 8)
    whole, parts = RunningMoments(8), RunningMoments(8)
    whole.update(x)
    for part in x.bfloat16().flatten(0, 2):
        parts.update(part)
    assert torch.allclose(whole.energy, parts.energy, rtol=0.02)


@pytest.mark.parametrize("bits", [2.5, 3])
def test_the_transform_is_that_of_all_vectors_at_once(bits: float) -> None:
    x = torch.randn(1, 1, 500, 32) * torch.rand(32) * 9 + 3 * torch.randn(32)
    groups = split_channels(bits, 32)
    moments = RunningMoments(32)
    for part in x[0, 0].split(99):
        moments.update(part)
    for found, expected in (
        (moments.transform(groups), value_statistics(x, groups)),
        (moments.transform(groups, mean=True), key_statistics(x, None, groups)),
    ):
        assert found.tensors().keys() == expected.tensors().keys()
        for name, tensor in expected.tensors().items():
            assert torch.allclose(found.tensors()[name].float(), tensor.float(), atol=1e-5)


def test_refusals() -> None:
    moments = RunningMoments(8)
    with pytest.raises(EmptyContextError):
        moments.order()
    with pytest.raises(InvalidInputError, match="16"):
        moments.update(torch.randn(3, 16))
    moments.update(torch.ones(3, 8))
    with pytest.raises(NonFiniteError):
        moments.update(torch.full((3, 8), float("inf")))
    assert moments.count == 3 and torch.equal(moments.mean, torch.ones(8, dtype=torch.float64))
