"""Moments of queries, against queries that were drawn."""

import pytest
import torch

from quantpress.errors import InvalidInputError
from quantpress.quantization.query_moments import QueryMoments


def test_expected_scores_are_those_of_normal_queries() -> None:
    mean, deviation, keys = torch.randn(2, 3, 16), torch.rand(2, 3, 16), torch.randn(2, 5, 16) / 2
    moments = QueryMoments(mean, deviation.square()).scaled(0.5)
    queries = mean + deviation * torch.randn(200_000, 2, 3, 16)
    drawn = torch.einsum("nhgd,htd->nhgt", queries.double(), keys.double()).mul(0.5).exp().mean(0).log()
    assert (moments.expected_scores(keys) - drawn).abs().max() < 0.02


def test_the_likeliest_key_of_each_page() -> None:
    keys = torch.randn(1, 2, 3, 128, 16)
    mean = torch.randn(2, 1, 16)
    wanted = torch.randint(128, (1, 2, 3))
    keys.scatter_(
        3, wanted[..., None, None].expand(1, 2, 3, 1, 16), 4 * mean[None].expand(1, 2, 3, 16)[..., None, :]
    )
    moments = QueryMoments(mean, torch.zeros_like(mean))
    assert torch.equal(moments.likeliest(keys), wanted)
    longest = QueryMoments(torch.zeros(2, 4, 16), torch.ones(2, 4, 16))
    assert torch.equal(longest.likeliest(keys), keys.norm(dim=-1).argmax(-1))


def test_shapes_are_checked() -> None:
    with pytest.raises(InvalidInputError, match=r"\(2, 3, 16\) and \(2, 4, 16\); give \[Hkv, G, D\]"):
        QueryMoments(torch.zeros(2, 3, 16), torch.zeros(2, 4, 16))
