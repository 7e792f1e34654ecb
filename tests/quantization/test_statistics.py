"""Transforms measured on keys and values: the formula, its optimality, and its edges."""

import pytest
import torch
from torch import Tensor

from quantpress.errors import EmptyContextError, InvalidInputError, NonFiniteError
from quantpress.quantization.budget import split_channels
from quantpress.quantization.codebook import codebook
from quantpress.quantization.rotation import Rotation
from quantpress.quantization.transform import ChannelTransform, key_statistics, value_statistics

ROUNDING = 2**-8  # of weights to bfloat16
ONE_GROUP = split_channels(3, 64)
TWO_GROUPS = split_channels(2.5, 64)


def uneven(seed: int, tokens: int = 600, dim: int = 64, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [1, 2, T, D] with a mean and uneven channels, queries [1, 2, T, D], and the queries' moment."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        channels = (spread * torch.randn(1, 2, 1, dim, generator=generator)).exp()
        return torch.randn(1, 2, tokens, dim, generator=generator) * channels

    keys = draw() + 4 * torch.randn(1, 2, 1, dim, generator=generator)
    queries = draw()
    return keys, queries, queries.square().mean(2)


def score_error(transform: ChannelTransform, keys: Tensor, queries: Tensor, bits: int = 3) -> float:
    """Mean squared error of q.k after a rotated code of the transformed keys."""
    dim = keys.shape[-1]
    rotation, book = Rotation(dim, "haar", seed=1), codebook(bits, dim, "lloyd_max")
    y = rotation.forward(transform.apply(keys))
    norm = y.norm(dim=-1, keepdim=True)
    decoded = transform.invert(rotation.inverse(book.dequantize(book.quantize(y / norm)) * norm))
    return ((keys - decoded) @ queries.mT).square().mean().item()


def test_mean_and_weight_follow_their_formulas() -> None:
    keys, _, moment = uneven(0)
    t = key_statistics(keys, moment, ONE_GROUP, floor=1e-9)
    exact_mean = keys.double().mean(2)
    exact_weight = (moment.double() / keys.double().var(2, correction=0)) ** 0.25
    exact_weight /= exact_weight.log().mean(-1, keepdim=True).exp()
    assert t.mean is not None and t.weight is not None and t.order is None
    assert torch.allclose(t.mean.double(), exact_mean, atol=1e-5)
    assert torch.allclose(t.weight.double(), exact_weight, rtol=ROUNDING + 1e-4)
    assert t.mean.dtype == t.weight.dtype == torch.float32


@pytest.mark.parametrize("seed", range(5))
def test_balancing_lowers_the_expected_score_error(seed: int) -> None:
    keys, queries, moment = uneven(seed)
    plain = score_error(ChannelTransform(), keys, queries)
    centred = score_error(key_statistics(keys, moment, ONE_GROUP, balance=False), keys, queries)
    balanced = score_error(key_statistics(keys, moment, ONE_GROUP), keys, queries)
    assert centred < plain / 2
    assert balanced < centred / 1.5


@pytest.mark.parametrize("exponent", [0.0, 0.15, 0.35, 0.5])
def test_the_exponent_of_one_quarter_beats_its_neighbours(exponent: float) -> None:
    ratios = []
    for seed in range(6):
        keys, queries, moment = uneven(seed, tokens=400)
        best = key_statistics(keys, moment, ONE_GROUP, floor=1e-6)
        assert best.weight is not None
        other = ChannelTransform(best.mean, best.weight ** (exponent / 0.25))
        ratios.append(score_error(best, keys, queries) / score_error(other, keys, queries))
    assert sum(ratios) / len(ratios) < 0.97


def test_the_weight_reaches_the_cauchy_schwarz_bound_and_nothing_near_it_is_better() -> None:
    keys, _, moment = uneven(3)
    t = key_statistics(keys, moment, ONE_GROUP, floor=1e-9)
    assert t.weight is not None
    variance, query = keys.double().var(2, correction=0), moment.double()

    def objective(weight: Tensor) -> Tensor:
        return (weight.square() * variance).sum(-1) * (query / weight.square()).sum(-1)

    best = objective(t.weight.double())
    assert torch.allclose(best, (variance * query).sqrt().sum(-1).square(), rtol=1e-4)
    for seed in range(20):
        noise = torch.randn(
            t.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        assert (objective(t.weight.double() * (0.1 * noise).exp()) > best).all()


def test_the_geometric_mean_of_the_weights_is_one_and_the_floor_bounds_them() -> None:
    keys, _, moment = uneven(1, spread=4.0)
    weights = {}
    for floor in (0.02, 0.1, 1.0):
        weight = key_statistics(keys, moment, ONE_GROUP, floor=floor).weight
        assert weight is not None
        assert torch.allclose(weight.log().mean(-1), torch.zeros(1, 2), atol=ROUNDING)
        weights[floor] = (weight.amax(-1) / weight.amin(-1)).max().item()
        assert weights[floor] <= (64 / floor) ** 0.5 * (1 + 2 * ROUNDING)
    assert weights[1.0] < weights[0.1] < weights[0.02]


def test_the_weight_ignores_the_scale_of_keys_and_of_queries() -> None:
    keys, _, moment = uneven(2)
    one = key_statistics(keys, moment, ONE_GROUP).weight
    other = key_statistics(keys * 100, moment * 1e-4, ONE_GROUP).weight
    assert one is not None and other is not None
    assert torch.allclose(one, other, rtol=2 * ROUNDING + 1e-4)


def test_parts_that_are_not_asked_for_are_absent() -> None:
    keys, _, moment = uneven(0)
    assert set(key_statistics(keys, None, ONE_GROUP).tensors()) == {"mean"}
    assert set(key_statistics(keys, moment, ONE_GROUP).tensors()) == {"mean", "weight"}
    assert set(key_statistics(keys, moment, ONE_GROUP, mean=False).tensors()) == {"weight"}
    assert set(key_statistics(keys, moment, ONE_GROUP, balance=False).tensors()) == {"mean"}
    assert set(key_statistics(keys, moment, ONE_GROUP, mean=False, balance=False).tensors()) == set()
    assert set(key_statistics(keys, moment, TWO_GROUPS).tensors()) == {"mean", "weight", "order"}
    assert set(value_statistics(keys, ONE_GROUP).tensors()) == set()
    assert set(value_statistics(keys, TWO_GROUPS).tensors()) == {"order"}


@pytest.mark.parametrize("balance", [True, False], ids=["balanced", "unbalanced"])
def test_outlier_channels_of_the_stored_key_come_first(balance: bool) -> None:
    keys, _, moment = uneven(4)
    t = key_statistics(keys, moment, TWO_GROUPS, balance=balance)
    energy = t.apply(keys).square().mean(2)
    assert (energy[..., :-1] >= energy[..., 1:] * (1 - 1e-4)).all()
    assert t.order is not None and t.order.dtype == torch.int16
    assert torch.equal(t.order.long().sort(-1).values, torch.arange(64).expand(1, 2, 64))


def test_outlier_channels_of_values_come_first() -> None:
    values, _, _ = uneven(5)
    energy = value_statistics(values, TWO_GROUPS).apply(values).square().mean(2)
    assert (energy[..., :-1] >= energy[..., 1:] * (1 - 1e-4)).all()


@pytest.mark.parametrize("offset", [100.0, 300.0])
def test_a_large_key_bias_in_bfloat16_does_not_swamp_the_variance(offset: float) -> None:
    # Keys of Qwen2.x carry biases of hundreds; E[k^2] - mu^2 in float32 would lose what is around them.
    keys = torch.randn(1, 1, 3000, 64, generator=torch.Generator().manual_seed(0)) * 3
    keys[..., 0] += offset
    keys = keys.bfloat16()
    exact = keys.double()
    t = key_statistics(keys, torch.ones(1, 1, 64), ONE_GROUP)
    expected = exact.var(2, correction=0) ** -0.25
    assert t.mean is not None and t.weight is not None
    assert torch.allclose(t.mean.double(), exact.mean(2), rtol=1e-5, atol=1e-5)
    assert torch.allclose(
        t.weight.double() / t.weight[..., :1], expected / expected[..., :1], rtol=2 * ROUNDING + 1e-3
    )


def test_statistics_do_not_depend_on_how_tokens_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantpress.quantization import moments

    keys, _, moment = uneven(6, tokens=257)
    whole = key_statistics(keys, moment, TWO_GROUPS)
    monkeypatch.setattr(moments, "_CHUNK_VALUES", 2 * 64 * 10)
    parts = key_statistics(keys, moment, TWO_GROUPS)
    for name, tensor in whole.tensors().items():
        assert torch.allclose(tensor.float(), parts.tensors()[name].float(), atol=1e-5), name


def test_one_token_and_constant_keys_give_finite_transforms() -> None:
    for keys in (torch.randn(1, 2, 1, 64), torch.ones(1, 2, 9, 64), torch.zeros(1, 2, 9, 64)):
        for moment in (torch.ones(1, 2, 64), torch.zeros(1, 2, 64)):
            t = key_statistics(keys, moment, TWO_GROUPS)
            assert all(part.float().isfinite().all() for part in t.tensors().values())
            assert torch.allclose(t.invert(t.apply(keys)), keys, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mean", [True, False])
def test_keys_and_values_that_are_not_finite_are_refused(bad: float, mean: bool) -> None:
    keys, _, moment = uneven(0, tokens=20)
    keys[0, 1, 7, 3] = bad
    with pytest.raises(NonFiniteError, match="keys hold NaN or infinity; check"):
        key_statistics(keys, moment, ONE_GROUP, mean=mean)
    with pytest.raises(NonFiniteError, match="values hold NaN or infinity"):
        value_statistics(keys, TWO_GROUPS)


def test_other_wrong_arguments_are_named() -> None:
    keys, _, moment = uneven(0, tokens=20)
    with pytest.raises(EmptyContextError, match=r"keys of shape \(1, 2, 0, 64\) hold no token"):
        key_statistics(keys[:, :, :0], moment, ONE_GROUP)
    with pytest.raises(
        InvalidInputError, match=r"\(1, 4, 64\) but the keys need \[B, Hkv, D\] = \(1, 2, 64\)"
    ):
        key_statistics(keys, torch.ones(1, 4, 64), ONE_GROUP)
    with pytest.raises(InvalidInputError, match=r"query_moment holds -1\.0; it is a mean of squares"):
        key_statistics(keys, -torch.ones(1, 2, 64), ONE_GROUP)
    with pytest.raises(NonFiniteError, match="query_moment hold"):
        key_statistics(keys, moment * float("nan"), ONE_GROUP)
    with pytest.raises(InvalidInputError, match=r"keys must be \[B, Hkv, T, D\], got shape \(2, 20, 64\)"):
        key_statistics(keys[0], moment, ONE_GROUP)
    for floor in (0.0, 1.5, float("nan")):
        with pytest.raises(InvalidInputError, match=f"0 < floor <= 1, got {floor}"):
            key_statistics(keys, moment, ONE_GROUP, floor=floor)
