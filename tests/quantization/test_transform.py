"""Channel transforms: inner products are kept, and nothing is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantpress.errors import InvalidInputError
from quantpress.quantization.transform import ChannelTransform


def transform(
    batch: int, heads: int, dim: int, parts: tuple[bool, bool, bool], seed: int = 0
) -> ChannelTransform:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(batch, heads, dim, generator=generator) * 3
    weight = (torch.randn(batch, heads, dim, generator=generator) * 0.7).exp()
    order = torch.rand(batch, heads, dim, generator=generator).argsort(-1).to(torch.int16)
    kept = [part if keep else None for part, keep in zip((mean, weight, order), parts, strict=True)]
    return ChannelTransform(*kept)


PARTS = st.tuples(st.booleans(), st.booleans(), st.booleans())


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    middle=st.lists(st.integers(1, 4), max_size=2),
    dim=st.sampled_from([8, 64, 80]),
    parts=PARTS,
    seed=st.integers(0, 1000),
)
def test_scores_are_kept_and_apply_is_undone(
    batch: int, heads: int, middle: list[int], dim: int, parts: tuple[bool, bool, bool], seed: int
) -> None:
    t = transform(batch, heads, dim, parts, seed)
    q, x = torch.randn(2, batch, heads, *middle, dim, generator=torch.Generator().manual_seed(seed + 1))
    exact = (q.double() * x.double()).sum(-1)
    scores = (t.query(q).double() * t.apply(x).double()).sum(-1) + t.bias(q).double()
    size = (q.abs().double() * (x.abs() + 6).double()).sum(-1)
    assert ((scores - exact).abs() <= 1e-6 * size).all()
    assert torch.allclose(t.invert(t.apply(x)), x, atol=5e-6, rtol=1e-5)
    assert t.apply(x).shape == x.shape and t.bias(q).shape == x.shape[:-1]
    assert t.apply(x).dtype == t.query(q).dtype == t.bias(q).dtype == torch.float32


@pytest.mark.parametrize("parts", [(True, True, True), (False, True, False)], ids=str)
def test_parts_of_one_entry_hold_for_all(parts: tuple[bool, bool, bool]) -> None:
    one, x = transform(1, 3, 8, parts), torch.randn(4, 3, 5, 8)
    each = one.expanded(4)
    assert all(part.shape == (4, 3, 8) for part in each.tensors().values())
    for name in ("apply", "invert", "query", "bias"):
        assert torch.equal(getattr(one, name)(x), getattr(each, name)(x))
    last = torch.tensor([3])
    kept, picked = (t.entries(lambda part: part.index_select(0, last)) for t in (one, each))
    assert all(part is one.tensors()[name] for name, part in kept.tensors().items())
    assert torch.equal(picked.apply(x[:1]), one.apply(x[:1]))


def test_each_part_does_what_it_says() -> None:
    x = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    mean = torch.tensor([[[1.0, 1.0, 1.0, 1.0]]])
    weight = torch.tensor([[[1.0, 2.0, 0.5, 4.0]]])
    order = torch.tensor([[[3, 0, 2, 1]]], dtype=torch.int16)
    assert ChannelTransform(mean=mean).apply(x).flatten().tolist() == [0, 1, 2, 3]
    assert ChannelTransform(weight=weight).apply(x).flatten().tolist() == [1, 4, 1.5, 16]
    assert ChannelTransform(order=order).apply(x).flatten().tolist() == [4, 1, 3, 2]
    assert ChannelTransform(mean, weight, order).apply(x).flatten().tolist() == [12, 0, 1, 2]
    assert ChannelTransform(mean, weight, order).query(x).flatten().tolist() == [1, 1, 6, 1]
    assert ChannelTransform(mean, weight, order).bias(x).flatten().tolist() == [10]
    assert ChannelTransform(weight=weight).bias(x).flatten().tolist() == [0]


def test_heads_and_batch_rows_have_their_own_parts() -> None:
    t = transform(2, 3, 16, (True, True, True))
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(2))
    whole = t.apply(x)
    for b in range(2):
        for h in range(3):
            one = t.map(lambda part, b=b, h=h: part[b : b + 1, h : h + 1])
            assert torch.equal(one.apply(x[b : b + 1, h : h + 1]), whole[b : b + 1, h : h + 1])


def test_a_key_at_the_mean_is_stored_as_zero() -> None:
    t = transform(1, 2, 64, (True, True, True))
    assert t.mean is not None
    assert torch.equal(t.apply(t.mean), torch.zeros(1, 2, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_input_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    t = transform(1, 2, 32, (True, True, True))
    x = torch.randn(1, 2, 7, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(t.apply(x), t.apply(x.float()))


def test_the_identity_keeps_everything() -> None:
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    t = ChannelTransform()
    assert torch.equal(t.apply(x), x) and torch.equal(t.invert(x), x) and torch.equal(t.query(x), x)
    assert not t.bias(x).any()
    assert t.tensors() == {} and t.nbytes == 0


def test_parts_are_stored_small_and_counted() -> None:
    t = transform(2, 3, 64, (True, True, True))
    assert {name: part.dtype for name, part in t.tensors().items()} == {
        "mean": torch.float32,
        "weight": torch.float32,
        "order": torch.int16,
    }
    assert t.nbytes == 2 * 3 * 64 * (4 + 4 + 2)
    assert transform(2, 3, 64, (False, True, False)).nbytes == 2 * 3 * 64 * 4


def test_map_selects_batch_rows_of_the_parts_that_are_there() -> None:
    t = transform(3, 2, 16, (True, False, True))
    picked = t.map(lambda part: part.index_select(0, torch.tensor([2, 0])))
    assert list(picked.tensors()) == ["mean", "order"]
    for name, part in picked.tensors().items():
        assert torch.equal(part, t.tensors()[name][[2, 0]])


def test_shapes_that_do_not_fit_are_named() -> None:
    t = transform(1, 2, 64, (True, False, False))
    message = r"\(1, 4, 5, 64\) does not fit the transform's mean of shape \(1, 2, 64\)"
    with pytest.raises(InvalidInputError, match=message):
        t.apply(torch.zeros(1, 4, 5, 64))
    for method in (t.apply, t.invert, t.query, t.bias):
        with pytest.raises(InvalidInputError, match=r"must be \[B, Hkv, \.\.\., D\]"):
            method(torch.zeros(1, 2, 5, 32))
    with pytest.raises(InvalidInputError, match=r"share one shape \[B, Hkv, D\], got .*\(1, 2, 32\)"):
        ChannelTransform(mean=torch.zeros(1, 2, 64), weight=torch.ones(1, 2, 32))
