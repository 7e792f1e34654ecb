"""Statistics of keys, on keys whose mean and channels are known."""

import pytest
import torch

from quantpress.errors import InvalidInputError
from quantpress.evaluation.key_statistics import KeyStatistics

TOKENS, DIM = 4000, 64


def noise(heads: int = 2) -> torch.Tensor:
    return torch.randn(1, heads, TOKENS, DIM, dtype=torch.float64)


def test_noise_has_neither_mean_nor_outliers() -> None:
    found = KeyStatistics.of(noise())
    assert found.mean_energy < 0.01 and found.outliers == found.centred_outliers == 0
    assert found.channels == DIM


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_the_share_of_the_mean_is_found_in_its_head(share: float) -> None:
    direction = torch.ones(DIM, dtype=torch.float64)  # energy DIM, as the noise's
    keys = noise()
    keys[:, 1] += (share / (1 - share)) ** 0.5 * direction
    found = KeyStatistics.of(keys)
    assert found.worst_mean_energy == pytest.approx(share, abs=0.02)
    assert found.mean_energy == pytest.approx(share / 2, abs=0.02)


def test_outliers_of_the_mean_go_with_it_and_others_stay() -> None:
    keys = noise()
    keys[..., 3] += 40  # in the mean of both heads
    keys[:, 0, :, 5] *= 100  # varies, in one head
    found = KeyStatistics.of(keys)
    assert (found.outliers, found.centred_outliers) == ((2 + 1) / 2, (1 + 0) / 2)


def test_first_tokens_do_not_count() -> None:
    keys = noise()
    keys[:, :, :4] = 1e6
    assert KeyStatistics.of(keys).mean_energy < 0.01
    assert KeyStatistics.of(keys, skip=0).mean_energy > KeyStatistics.of(keys).mean_energy


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="5 tokens are too few"):
        KeyStatistics.of(noise()[:, :, :5])
