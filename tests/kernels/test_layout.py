"""The page layout against an oracle that reads single bits where the definition says they are."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantpress.errors import InvalidInputError, UnsupportedBitsError
from quantpress.kernels.layout import (
    PAGE_TOKENS,
    ROLES,
    pack_pages,
    page_bytes,
    page_table,
    read_pages,
    unpack_pages,
)
from tests.grids import covering

WIDTHS = (1, 2, 3, 4, 8)
CHANNELS = (4, 20, 40, 64, 80, 96, 128, 576)
WORD_BITS = 32


def random_codes(*shape: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape).to(torch.uint8)


def word_of(bits: int, channels: int, role: str, token: int, channel: int) -> tuple[int, int, int, int]:
    """(word in its plane, words of a plane, part, lane) of one code, from the definition."""
    rows = {1: 16, 2: 32, 3: 16, 4: 64, 8: 128}[bits]
    part, row = divmod(token, rows)
    if role == "key":
        width = 64 if channels % 64 == 0 else channels
        block, inside = divmod(channel, width)
        word, lane = divmod(inside, 4)
        word += (block * rows + row) * (width // 4)
    else:
        quad, lane = divmod(row, 4)
        word = quad * channels + channel
    return word, rows * channels // 4, part, lane


def code_bits(bits: int, channels: int, role: str, token: int, channel: int) -> tuple[list[int], int | None]:
    """(bits of the magnitude or code, lowest first; bit of the sign or None) of one code in its page."""
    word, plane, p, i = word_of(bits, channels, role, token, channel)
    start = word * WORD_BITS
    if bits == 1:
        return [], start + 8 * i + 7 - p
    if bits == 2:
        return [start + 16 * (p >> 1) + 4 * i + 2 * (p & 1) + k for k in range(2)], None
    if bits == 3 and p >= 6:
        return [start + k * plane * WORD_BITS + 16 * (p - 6) + 4 * i + 3 for k in range(3)], None
    if bits == 3:
        k, h = divmod(p, 2)
        return [start + k * plane * WORD_BITS + 16 * h + 4 * i + bit for bit in range(3)], None
    if bits == 4:
        return [start + 16 * p + 4 * i + k for k in range(3)], start + 8 * i + 7 - 4 * p
    return [start + 8 * i + k for k in range(8)], None


def oracle(page: torch.Tensor, bits: int, channels: int, role: str) -> torch.Tensor:
    """Codes [128, C] of one page, bit by bit."""
    stream = np.unpackbits(page.numpy(), bitorder="little")  # bit k of a little-endian word is its k-th bit
    codes = torch.empty(PAGE_TOKENS, channels, dtype=torch.uint8)
    half = 1 << (bits - 1)
    for token in range(PAGE_TOKENS):
        for channel in range(channels):
            size, sign = code_bits(bits, channels, role, token, channel)
            magnitude = sum(int(stream[bit]) << k for k, bit in enumerate(size))
            if sign is None:
                codes[token, channel] = magnitude
            else:
                codes[token, channel] = half - 1 - magnitude if stream[sign] else half + magnitude
    return codes


@pytest.mark.parametrize(("channels", "bits", "role"), covering(CHANNELS, WIDTHS, ROLES))
def test_unpack_undoes_pack(channels: int, bits: int, role: str) -> None:
    codes = random_codes(2, 1, 3, PAGE_TOKENS, channels, bits=bits)
    packed = pack_pages(codes, bits, role)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 1, 3, page_bytes(bits, channels))
    assert packed.untyped_storage().nbytes() == codes.numel() * bits // 8
    assert torch.equal(unpack_pages(packed, bits, channels, role), codes)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("channels", [20, 128])  # of keys, a block of all channels, and two of 64
def test_every_bit_is_where_the_definition_says(channels: int, bits: int, role: str) -> None:
    codes = random_codes(2, PAGE_TOKENS, channels, bits=bits)
    page = pack_pages(codes, bits, role)[1]
    assert torch.equal(oracle(page, bits, channels, role), codes[1])


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("channels", [20, 128])
def test_the_definition_uses_every_bit_of_a_page_once(channels: int, bits: int, role: str) -> None:
    used = []
    for token in range(PAGE_TOKENS):
        for channel in range(channels):
            size, sign = code_bits(bits, channels, role, token, channel)
            used += size if sign is None else [*size, sign]
    assert sorted(used) == list(range(8 * page_bytes(bits, channels)))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_any_bytes_are_a_page(bits: int, role: str) -> None:
    packed = torch.randint(0, 256, (5, page_bytes(bits, 20))).to(torch.uint8)
    assert torch.equal(pack_pages(unpack_pages(packed, bits, 20, role), bits, role), packed)


@given(
    bits=st.sampled_from(WIDTHS),
    role=st.sampled_from(ROLES),
    words=st.integers(1, 12),
    token=st.integers(0, PAGE_TOKENS - 1),
    data=st.data(),
)
def test_a_code_changes_its_own_bits_only(
    bits: int, role: str, words: int, token: int, data: st.DataObject
) -> None:
    channels = 4 * words
    channel = data.draw(st.integers(0, channels - 1))
    codes = random_codes(1, PAGE_TOKENS, channels, bits=bits)
    before = np.unpackbits(pack_pages(codes, bits, role).numpy(), bitorder="little")
    codes[0, token, channel] ^= data.draw(st.integers(1, (1 << bits) - 1))
    after = np.unpackbits(pack_pages(codes, bits, role).numpy(), bitorder="little")
    size, sign = code_bits(bits, channels, role, token, channel)
    changed = set(np.flatnonzero(before != after).tolist())
    assert changed and changed <= {*size, *([] if sign is None else [sign])}


@pytest.mark.parametrize(("bits", "channels"), covering(WIDTHS, CHANNELS, strength=1))
def test_a_page_takes_bits_and_nothing_more(bits: int, channels: int) -> None:
    assert page_bytes(bits, channels) * 8 == bits * PAGE_TOKENS * channels


def test_three_bits_are_three_bits() -> None:
    packed = pack_pages(random_codes(PAGE_TOKENS, 128, bits=3), 3, "key")
    assert packed.numel() * 8 / (PAGE_TOKENS * 128) == 3.0


@pytest.mark.parametrize(
    ("bits", "role", "shape"),
    covering(WIDTHS, ROLES, [(), (0,), (2, 0, 3), (1, 2, 3, 2)], strength=1),
    ids=str,
)
def test_any_leading_dimensions_will_do(bits: int, role: str, shape: tuple[int, ...]) -> None:
    codes = random_codes(*shape, PAGE_TOKENS, 20, bits=bits)
    packed = pack_pages(codes, bits, role)
    assert packed.shape == (*shape, page_bytes(bits, 20))
    assert torch.equal(unpack_pages(packed, bits, 20, role), codes)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_views_of_pages_and_of_codes_read_the_same(bits: int, role: str) -> None:
    codes = random_codes(2, 3, 6, PAGE_TOKENS, 40, bits=bits)
    packed = pack_pages(codes, bits, role)
    assert torch.equal(unpack_pages(packed[:, 1:, 1::2], bits, 40, role), codes[:, 1:, 1::2])
    transposed = codes.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(pack_pages(transposed, bits, role), packed)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_read_pages_gives_the_very_entries(bits: int, role: str) -> None:
    entries = torch.randn(1 << bits)
    entries[0], entries[-1] = float("nan"), -0.0  # copied bit by bit, whatever they look like
    codes = random_codes(3, PAGE_TOKENS, 20, bits=bits)
    found = read_pages(pack_pages(codes, bits, role), page_table(entries, bits), bits, 20, role)
    found = found.reshape(3, PAGE_TOKENS, 20)
    assert torch.equal(found.view(torch.int32), entries[codes.long()].view(torch.int32))


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "role", "error"),
    [
        ((128, 8), torch.uint8, 5, "key", UnsupportedBitsError),
        ((128, 8), torch.uint8, 0, "key", UnsupportedBitsError),
        ((128, 8), torch.uint8, 4, "query", InvalidInputError),
        ((128, 8), torch.int64, 4, "key", InvalidInputError),
        ((127, 8), torch.uint8, 4, "key", InvalidInputError),
        ((128,), torch.uint8, 4, "key", InvalidInputError),
        ((128, 6), torch.uint8, 4, "key", InvalidInputError),
        ((128, 0), torch.uint8, 4, "value", InvalidInputError),
    ],
)
def test_pack_refuses(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, role: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        pack_pages(torch.zeros(shape, dtype=dtype), bits, role)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_pack_refuses_a_code_that_is_too_wide(bits: int) -> None:
    codes = random_codes(PAGE_TOKENS, 8, bits=bits)
    codes[77, 3] = 1 << bits
    with pytest.raises(InvalidInputError, match=f"code {1 << bits} "):
        pack_pages(codes, bits, "key")


def test_unpack_refuses_what_is_not_pages() -> None:
    packed = torch.zeros(2, page_bytes(4, 64), dtype=torch.uint8)
    with pytest.raises(InvalidInputError, match="3072"):
        unpack_pages(packed, 3, 64, "key")
    with pytest.raises(InvalidInputError, match="int8"):
        unpack_pages(packed.to(torch.int8), 4, 64, "key")
    with pytest.raises(InvalidInputError, match="role"):
        unpack_pages(packed, 4, 64, "keys")
    with pytest.raises(UnsupportedBitsError, match=r"2\.5"):
        unpack_pages(packed, 2.5, 64, "key")  # type: ignore[arg-type]
