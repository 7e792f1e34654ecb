"""The page layout: where each code of a page lives, bit by bit. Every kernel reads this one definition.

A page holds the codes of `PAGE_TOKENS` consecutive tokens of one KV head for a group of C channels, and takes
exactly 16 * bits * C bytes. A code indexes an ascending symmetric codebook. It is stored as one field or two:

    bits  fields (width)                field value
    1     sign (1)                      1 for the negative level
    2     code (2)                      the code itself
    3     magnitude (2), then sign (1)  place among the ascending positive levels; 1 for the negative half
    4     magnitude and sign (4)        the same, with a magnitude of 3 bits
    8     code (8)                      the code itself

All fields of width f form a plane of 16 * f * C bytes; the planes of a page follow each other. A plane is a
matrix of little-endian 32-bit words, and a word holds lanes i = 0 to 3 of parts p = 0 to 8 / f - 1:

    keys    [16 * f rows, C / 4 words]  row r, word w:  token p * 16 * f + r,          channel 4 * w + i
    values  [C rows, 4 * f words]       row c, word w:  token p * 16 * f + 4 * w + i,  channel c

so that four neighbours along the axis that attention sums over (channels of a key, tokens of a value) share a
word. Bits in the word, chosen so that one byte permutation on a GPU looks up four values at once:

    f = 4   magnitude at 16 * p + 4 * i (3 bits), sign at 8 * i + 7 - 4 * p
    f = 2   16 * (p // 2) + 4 * i + 2 * (p % 2)
    f = 1   8 * i + 7 - p
    f = 8   8 * i

Reading goes by quads: shifts and masks make a 16-bit index of the four lanes of a part, and one table lookup
makes four values of the index, whatever they stand for (codes, or levels of a codebook).
"""

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError, UnsupportedBitsError

PAGE_TOKENS = 128
ROLES = ("key", "value")
FIELD_WIDTHS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}

_BYTE_FEET = 0x01010101  # the lowest bit of each byte of a word
_QUAD_SIGNS = (7, 15, 3, 11)  # the sign of each lane in a quad's index; its magnitude is at 4 * lane
_WIDE = {1: torch.int32, 4: torch.complex128}  # bytes of an entry -> dtype as wide as four of them


def page_bytes(bits: int, channels: int) -> int:
    """Bytes of one page of `channels` channels at `bits` bits a code: 128 * bits * channels / 8.

    Raises:
        UnsupportedBitsError: no page stores this width.
        InvalidInputError: `channels` is not a positive multiple of 4.

    >>> page_bytes(3, 128)
    6144
    """
    if bits not in FIELD_WIDTHS:
        raise UnsupportedBitsError(f"cannot pack codes of {bits!r} bits; use one of {tuple(FIELD_WIDTHS)}")
    if channels <= 0 or channels % 4:
        raise InvalidInputError(f"a page needs a positive multiple of 4 channels, got {channels}")
    return PAGE_TOKENS // 8 * bits * channels


def pack_pages(codes: Tensor, bits: int, role: str) -> Tensor:
    """Pack codes into pages.

    Args:
        codes: [..., P, 128, C] uint8, each below 2**bits.
        bits: code width, one of 1, 2, 3, 4, 8.
        role: "key" or "value".

    Returns:
        [..., P, page_bytes(bits, C)] uint8.

    Raises:
        InvalidInputError: wrong role, dtype or shape, or a code that needs more bits.
        UnsupportedBitsError: no page stores this width.
    """
    if codes.dtype != torch.uint8 or codes.dim() < 2 or codes.shape[-2] != PAGE_TOKENS:
        wanted = f"uint8 [..., {PAGE_TOKENS}, C]"
        raise InvalidInputError(f"codes must be {wanted}, got {codes.dtype} {tuple(codes.shape)}")
    lead, channels = codes.shape[:-2], codes.shape[-1]
    size = _checked_size(bits, channels, role)
    if not codes.numel():
        return codes.new_empty(*lead, size)
    if int(codes.max()) >= 1 << bits:
        raise InvalidInputError(f"code {int(codes.max())} does not fit into {bits} bits")
    rows = codes if role == "key" else codes.transpose(-1, -2)
    words = rows.contiguous().view(torch.int32)  # four lanes, one code a byte
    half = (1 << (bits - 1)) - 1
    negative = (~words >> (bits - 1)) & _BYTE_FEET
    magnitude = (words ^ (negative * half)) & (half * _BYTE_FEET)
    planes = []
    for width in FIELD_WIDTHS[bits]:
        run = 4 * width * (channels if role == "key" else 1)  # words of one part that follow each other
        grid = (words.numel() * width // 8 // run, 8 // width, run)
        field = words if bits in (2, 8) else magnitude
        plane = _pack_plane(field.reshape(grid), negative.reshape(grid), width)
        planes.append(plane.view(*lead, 4 * width * channels))
    return torch.cat(planes, dim=-1).view(torch.uint8).view(*lead, size)


def _pack_plane(magnitude: Tensor, negative: Tensor, width: int) -> Tensor:
    """Fields of one width, one a byte, [rows, parts, words] int32 twice -> the words of their plane."""
    plane = torch.zeros_like(magnitude[:, 0])
    for part in range(8 // width):
        size, sign = magnitude[:, part], negative[:, part]
        if width == 8:
            plane |= size
        elif width == 4:
            plane |= (_nibbles(size) << (16 * part)) | (sign << (7 - 4 * part))
        elif width == 2:
            plane |= _nibbles(size) << (16 * (part // 2) + 2 * (part % 2))
        else:
            plane |= sign << (7 - part)
    return plane


def unpack_pages(packed: Tensor, bits: int, channels: int, role: str) -> Tensor:
    """Undo `pack_pages`: [..., P, page_bytes] uint8 -> codes [..., P, 128, C] uint8.

    Raises:
        InvalidInputError: wrong role, or `packed` is not made of pages of this size.
        UnsupportedBitsError: no page stores this width.
    """
    _checked_size(bits, channels, role)
    table = page_table(torch.arange(1 << bits, dtype=torch.uint8, device=packed.device), bits)
    codes = read_pages(packed, table, bits, channels, role)
    return codes.reshape(*packed.shape[:-1], PAGE_TOKENS, channels)


def page_table(entries: Tensor, bits: int) -> Tensor:
    """The table with which `read_pages` makes entries of codes.

    Args:
        entries: [2**bits] uint8 or float32, what each code stands for.
        bits: code width, one of 1, 2, 3, 4, 8.

    Returns:
        One element as wide as four entries per index of a quad; for 8 bits `entries` itself.
    """
    if bits == 8:
        return entries
    quads = entries[_quad_codes(bits).to(entries.device)]
    return quads.view(_WIDE[entries.element_size()]).squeeze(-1)


def read_pages(packed: Tensor, table: Tensor, bits: int, channels: int, role: str) -> Tensor:
    """Look up every code of some pages.

    Args:
        packed: [..., page_bytes] uint8.
        table: from `page_table`.
        bits: code width.
        channels: C.
        role: "key" or "value".

    Returns:
        [..., parts, 128 / parts, C] uint8 or float32, the tokens in order over two dimensions. For keys the
        last two dimensions are contiguous, for values their transpose is.

    Raises:
        InvalidInputError: wrong role, or `packed` is not made of pages of this size.
        UnsupportedBitsError: no page stores this width.
    """
    size = _checked_size(bits, channels, role)
    if packed.dtype != torch.uint8 or packed.dim() < 1 or packed.shape[-1] != size:
        wanted = f"uint8 [..., {size}] for {bits} bits and {channels} channels"
        raise InvalidInputError(f"pages must be {wanted}, got {packed.dtype} {tuple(packed.shape)}")
    lead, pages = packed.shape[:-1], packed.reshape(-1, size)
    index = pages.int() if bits == 8 else _quad_indices(pages.view(torch.int32), bits, channels, role)
    found = table.index_select(0, index.view(-1))
    if bits < 8:
        found = found.view(torch.uint8 if table.dtype == torch.int32 else torch.float32)
    parts = 8 // FIELD_WIDTHS[bits][-1]
    tokens = PAGE_TOKENS // parts
    if role == "key":
        found = found.view(parts, prod(lead), tokens, channels)
    else:
        found = found.view(parts, prod(lead), channels, tokens).transpose(-1, -2)
    return found.transpose(0, 1).view(*lead, parts, tokens, channels)


def _quad_indices(words: Tensor, bits: int, channels: int, role: str) -> Tensor:
    """[N, words of a page] int32 -> [parts, N, words of the last plane] int32 indices of quads."""
    parts = 8 // FIELD_WIDTHS[bits][-1]
    part = torch.arange(parts, dtype=torch.int32, device=words.device).view(-1, 1, 1)
    if bits == 4:
        first = (words & 0xF7F7).bitwise_or_((words >> 20).bitwise_and_(0x0808))
        second = ((words >> 16).bitwise_and_(0x7F7F)).bitwise_or_((words << 4).bitwise_and_(0x8080))
        return torch.stack((first, second))
    if bits == 2:
        return (words >> (part // 2 * 16 + part % 2 * 2)).bitwise_and_(0x3333)
    signs = words[:, -4 * channels :]
    index = (signs << part).bitwise_and_(0x8080)
    index |= (signs >> (20 - part)).bitwise_and_(0x0808)
    if bits == 3:  # a row of the magnitude plane is as long as two rows of the sign plane
        run = 4 * channels if role == "key" else 4
        halves = words[:, : 8 * channels].reshape(-1, 2, run).transpose(0, 1).reshape(1, 2, -1)
        shift = part[:4] // 2 * 16 + part[:4] % 2 * 2
        index |= (halves >> shift).bitwise_and_(0x3333).view_as(index)
    return index


@lru_cache(maxsize=8)
def _quad_codes(bits: int) -> Tensor:
    """[indices, 4] int64: the codes of the four lanes that an index from `_quad_indices` stands for."""
    half = (1 << (bits - 1)) - 1
    lanes = []
    with torch.inference_mode(False):  # kept: must stay usable outside inference mode
        index = torch.arange(0x3334 if bits == 2 else 0x10000)
        for lane, sign_bit in enumerate(_QUAD_SIGNS):
            field = index >> (4 * lane)
            negative = (index >> sign_bit) & 1
            signed = ((field & half) ^ (negative * half)) + (1 - negative) * (half + 1)
            lanes.append(field & 3 if bits == 2 else signed)
        return torch.stack(lanes, dim=-1)


def _nibbles(words: Tensor) -> Tensor:
    """Move the low nibbles of a word's four bytes into its low half."""
    pairs = (words | (words >> 4)) & 0x00FF00FF
    return (pairs | (pairs >> 8)) & 0xFFFF


def _checked_size(bits: int, channels: int, role: str) -> int:
    if role not in ROLES:
        raise InvalidInputError(f"role must be one of {ROLES}, got {role!r}")
    return page_bytes(bits, channels)
