"""Bit budgets: what each width stores, exactly."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpress.errors import UnsupportedBitsError, UnsupportedHeadDimError
from quantpress.quantization.budget import ChannelGroup, split_channels
from tests.grids import covering


def true_bits(groups: tuple[ChannelGroup, ...]) -> float:
    channels = sum(group.channels for group in groups)
    return sum(group.channels * group.bits for group in groups) / channels


@pytest.mark.parametrize(
    ("bits", "head_dim"), covering([1, 2, 3, 4, 8, 3.0], [8, 64, 80, 128, 576, 1024], strength=1)
)
def test_a_whole_width_is_one_group(bits: float, head_dim: int) -> None:
    assert split_channels(bits, head_dim) == (ChannelGroup(head_dim, int(bits)),)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
def test_a_half_is_half_and_half_with_the_outliers_first(bits: float, head_dim: int) -> None:
    wide, narrow = split_channels(bits, head_dim)
    assert wide == ChannelGroup(head_dim // 2, math.ceil(bits))
    assert narrow == ChannelGroup(head_dim // 2, math.floor(bits))
    assert true_bits((wide, narrow)) == bits


def test_the_paper_s_split_of_32_and_96_channels_is_2_25_bits_and_not_2_5() -> None:
    paper = (ChannelGroup(32, 3), ChannelGroup(96, 2))
    assert true_bits(paper) == 2.25
    assert split_channels(2.25, 128) == paper
    assert true_bits(split_channels(2.5, 128)) == 2.5


@given(
    bits=st.floats(1, 4, exclude_min=True, exclude_max=True),
    head_dim=st.integers(2, 256).map(lambda n: 4 * n),
)
def test_every_fraction_is_as_close_as_groups_of_four_allow(bits: float, head_dim: int) -> None:
    groups = split_channels(bits, head_dim)
    assert sum(group.channels for group in groups) == head_dim
    assert all(group.channels % 4 == 0 and group.channels > 0 for group in groups)
    assert [group.bits for group in groups] == sorted((group.bits for group in groups), reverse=True)
    assert abs(true_bits(groups) - bits) <= 4 / head_dim


@pytest.mark.parametrize(
    "bits", [0, 5, 6, 7, 16, -1, 0.5, 4.5, 1000, math.nan, math.inf, True, "4", None], ids=repr
)
def test_other_widths_are_refused_with_the_allowed_ones(bits: float) -> None:
    with pytest.raises(UnsupportedBitsError) as caught:
        split_channels(bits, 128)
    assert f"bits={bits!r}" in str(caught.value)
    assert "1, 2, 3, 4, 8 and fractions between 1 and 4" in str(caught.value)


@pytest.mark.parametrize("head_dim", [0, 4, 63, 66, 1028, -64, 64.0, True], ids=repr)
def test_other_head_dims_are_refused_with_the_rule(head_dim: int) -> None:
    with pytest.raises(UnsupportedHeadDimError) as caught:
        split_channels(4, head_dim)
    assert f"head_dim {head_dim!r} cannot be packed" in str(caught.value)
    assert "multiple of 4 from 8 to 1024" in str(caught.value)


def test_a_group_checks_itself() -> None:
    with pytest.raises(UnsupportedBitsError, match="5 bits; allowed are"):
        ChannelGroup(64, 5)
    with pytest.raises(UnsupportedHeadDimError, match="66 channels; use a multiple of 4"):
        ChannelGroup(66, 4)
