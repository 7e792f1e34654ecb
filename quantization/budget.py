"""How many bits each channel gets.

A whole width gives every channel the same code. A fractional width such as 2.5 splits the channels into two
groups: those with the most energy get one bit more than the rest. Each group is rotated and coded by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real

from quantpress.errors import UnsupportedBitsError, UnsupportedHeadDimError

WHOLE_BITS = (1, 2, 3, 4, 8)
"""Code widths that a page stores."""

CHANNEL_STEP = 4
"""A group has a multiple of 4 channels, since a 32-bit word of a page holds codes of 4 neighbours."""

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 1024

ALLOWED = "allowed are 1, 2, 3, 4, 8 and fractions between 1 and 4 such as 2.5"


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are rotated and coded together.

    Args:
        channels: number of channels C of the group, a multiple of 4.
        bits: code width, 1, 2, 3, 4 or 8.

    Raises:
        UnsupportedBitsError: no page stores codes of `bits`.
        UnsupportedHeadDimError: `channels` is not a positive multiple of 4.
    """

    channels: int
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in WHOLE_BITS:
            raise UnsupportedBitsError(
                f"a channel group cannot have {self.bits!r} bits; allowed are {WHOLE_BITS}"
            )
        if self.channels < CHANNEL_STEP or self.channels % CHANNEL_STEP:
            raise UnsupportedHeadDimError(
                f"a channel group cannot have {self.channels!r} channels; use a multiple of {CHANNEL_STEP}"
            )


def check_head_dim(head_dim: int) -> None:
    """Refuse a head_dim that cannot be rotated and packed.

    Raises:
        UnsupportedHeadDimError: `head_dim` is not a multiple of 4 in 8 to 1024.
    """
    whole = isinstance(head_dim, int) and not isinstance(head_dim, bool)
    if not whole or head_dim % CHANNEL_STEP or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise UnsupportedHeadDimError(
            f"head_dim {head_dim!r} cannot be packed; it must be a multiple of {CHANNEL_STEP} "
            f"from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}. Leave this layer unpacked"
        )


@lru_cache(maxsize=256, typed=True)  # typed: 64.0 and True are not 64 and 1
def split_channels(bits: float, head_dim: int) -> tuple[ChannelGroup, ...]:
    """Split head_dim channels into groups whose mean width is `bits`, or the nearest width possible.

    A width b + f with 0 < f < 1 makes an outlier group of round(f * head_dim / 4) * 4 channels, at least 4,
    with b + 1 bits, which comes first, and a group of the other channels, at least 4, with b bits.

    Args:
        bits: mean code width per channel: 1, 2, 3, 4, 8 or a fraction between 1 and 4.
        head_dim: channels D of one head, a multiple of 4 in 8 to 1024.

    Returns:
        One group, or two with the wider (outlier) group first. Their channels add up to `head_dim`.

    Raises:
        UnsupportedBitsError: `bits` is not one of the allowed widths.
        UnsupportedHeadDimError: `head_dim` cannot be packed.

    Source: outlier channels after TurboQuant, arXiv 2504.19874, section 4.3.

    >>> split_channels(2.5, 128)
    (ChannelGroup(channels=64, bits=3), ChannelGroup(channels=64, bits=2))
    >>> split_channels(4, 80)
    (ChannelGroup(channels=80, bits=4),)
    """
    check_head_dim(head_dim)
    if not isinstance(bits, Real) or isinstance(bits, bool) or not math.isfinite(bits):
        raise UnsupportedBitsError(f"bits={bits!r} is not a code width; {ALLOWED}")
    if bits in WHOLE_BITS:
        return (ChannelGroup(head_dim, int(bits)),)
    if not 1 < bits < 4:
        raise UnsupportedBitsError(f"bits={bits!r} cannot be stored; {ALLOWED}")
    narrow = math.floor(bits)
    words = round((bits - narrow) * head_dim / CHANNEL_STEP)
    outliers = min(max(words * CHANNEL_STEP, CHANNEL_STEP), head_dim - CHANNEL_STEP)
    return (ChannelGroup(outliers, narrow + 1), ChannelGroup(head_dim - outliers, narrow))
