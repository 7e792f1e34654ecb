"""Levels that codes of several channels choose, from bit planes, inside a kernel (Triton).

The number of a level is a window over the planes: bits of the channel, and of the channels before it. A word
of a plane has a bit of four neighbouring values in each part, and bytes of one word can hold the windows of
all four, so they are found together. Only nine bits take a second word.
"""

import triton
import triton.language as tl

from quantpress.kernels.attend.parts.levels import TILE, key_tile, rows_of_tile, value_tile

FEET = tl.constexpr(0x01010101)
"""The lowest bit of each byte of a word."""


@triton.jit
def _key_bits(ptr, begin, back: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """One bit of four channels of keys in the feet of words [TILE, CP / 4], `back` words before their own."""
    part, row = rows_of_tile(begin, 1, False)
    own = tl.arange(0, CP // 4)[None, :]
    column = tl.where(own < back, own + C // 4, own) - back
    W: tl.constexpr = 16 if C % 64 == 0 else C // 4
    at = column // W * (16 * W) + row * W + column % W
    words = tl.load(ptr + at, mask=(own < C // 4) & (row >= 0), other=0)
    return (words >> (7 - part)) & FEET


@triton.jit
def _value_bits(ptr, begin, back: tl.constexpr, C: tl.constexpr, CP: tl.constexpr):
    """One bit of four tokens of values in the feet of words [TILE / 4, CP], `back` channels before."""
    part, row = rows_of_tile(begin, 1, True)
    own = tl.arange(0, CP)[None, :]
    column = tl.where(own < back, own + C, own) - back
    words = tl.load(ptr + row * C + column, mask=(own < C) & (row >= 0), other=0)
    return (words >> (7 - part)) & FEET


@triton.jit
def _level(low, high, levels_ptr, lane: tl.constexpr, WIDE: tl.constexpr):
    number = (low >> (8 * lane)) & 255
    if WIDE:
        number |= ((high >> (8 * lane)) & 255) << 8
    return tl.load(levels_ptr + number)


@triton.jit
def _lanes(low, high, levels_ptr, WIDE: tl.constexpr):
    a, b = _level(low, high, levels_ptr, 0, WIDE), _level(low, high, levels_ptr, 1, WIDE)
    c, d = _level(low, high, levels_ptr, 2, WIDE), _level(low, high, levels_ptr, 3, WIDE)
    return a, b, c, d


@triton.jit
def _placed(low, high, bits, at: tl.constexpr):
    """Bits of four windows put where they belong."""
    if at < 8:
        low |= bits << at
    else:
        high |= bits << (at - 8)
    return low, high


@triton.jit
def key_windows(
    ptr, begin, levels_ptr, C: tl.constexpr, CP: tl.constexpr, BITS: tl.constexpr, REACH: tl.constexpr
):
    """Levels [TILE, CP] float16 of TILE tokens of a page of keys from `begin` on, a multiple of TILE.

    ptr: the page's words, BITS planes; levels_ptr: a row of `level_rows`; C: channels, CP: padded; REACH: up
    to 8, BITS * REACH up to 16. Channels beyond those that there are have any level.
    """
    low = tl.zeros([TILE, CP // 4], tl.int32)
    high = low
    for plane in tl.static_range(BITS):
        own = ptr + plane * (4 * C)
        here, before = _key_bits(own, begin, 0, C, CP), _key_bits(own, begin, 1, C, CP)
        for lag in tl.static_range(REACH):
            if lag == 4:
                here, before = before, _key_bits(own, begin, 2, C, CP)
            bits = here
            if lag % 4 > 0:  # four channels that two words have
                bits = (here << (8 * (lag % 4))) | (before >> (32 - 8 * (lag % 4)))
            low, high = _placed(low, high, bits, plane * REACH + lag)
    a, b, c, d = _lanes(low, high, levels_ptr, BITS * REACH > 8)
    return key_tile(a, b, c, d, CP)


@triton.jit
def value_windows(
    ptr, begin, levels_ptr, C: tl.constexpr, CP: tl.constexpr, BITS: tl.constexpr, REACH: tl.constexpr
):
    """Levels [CP, TILE] float16 of a page of values, as `key_windows`."""
    low = tl.zeros([TILE // 4, CP], tl.int32)
    high = low
    for plane in tl.static_range(BITS):
        for lag in tl.static_range(REACH):
            bits = _value_bits(ptr + plane * (4 * C), begin, lag, C, CP)
            low, high = _placed(low, high, bits, plane * REACH + lag)
    a, b, c, d = _lanes(low, high, levels_ptr, BITS * REACH > 8)
    return value_tile(a, b, c, d, CP)
