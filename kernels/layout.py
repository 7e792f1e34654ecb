"""The page layout: the position of every code of a page, bit by bit. All kernels follow this definition.

A page holds the codes of `PAGE_TOKENS` consecutive tokens of one KV head for a group of C channels, and takes
16 * bits * C bytes. A code indexes an ascending symmetric codebook. The tokens are divided into parts of R
consecutive tokens, token = p * R + row, and a little-endian 32-bit word holds lanes i = 0 to 3 of every part
p:

    bits  parts  R    where the code of part p, lane i, is in a word
    1     8      16   bit 8 * i + 7 - p: 1 for the negative level
    2     4      32   two bits from 16 * (p // 2) + 4 * i + 2 * (p % 2): the code itself
    3     8      16   the code itself, in three planes of words, k = 0 to 2
                        p = 2 * k + h:  three bits from 16 * h + 4 * i of plane k
                        p = 6 + h:      bit 16 * h + 4 * i + 3 of plane k is bit k of the code
    4     2      64   three bits from 16 * p + 4 * i: magnitude, the index among ascending positive levels
                      bit 8 * i + 7 - 4 * p: 1 for the negative half
    8     1      128  eight bits from 8 * i: the code itself

Only 3 bits have more than one plane; planes follow each other. The lanes of a word are four neighbours along
the axis that attention sums over, channels of a key and tokens of a value, and the words of a plane are

    keys    [C / W blocks, R rows, W / 4]   (b, r, w): token p * R + r, channel W * b + 4 * w + i
    values  [R / 4 quads, C]                (q, c): token p * R + 4 * q + i, channel c

with W = 64 where 64 divides C, else W = C. So a tile of neighbouring words is an operand of a product, and a
few operations on whole words, or one byte permutation, look up four values at once.

PyTorch reads pages by quads: shifts and masks make a 16-bit index of the four lanes of a part, and one table
lookup turns the index into four values (codes, or levels of a codebook). The packed words are put into
reading order first, since there are fewer of them than values.
"""

from math import prod

import torch
from torch import Tensor

from quantpress.errors import InvalidInputError, UnsupportedBitsError
from quantpress.kept import kept

PAGE_TOKENS = 128
ROLES = ("key", "value")
PARTS = {1: 8, 2: 4, 3: 8, 4: 2, 8: 1}
BLOCK_CHANNELS = 64  # W, where it divides the channels of a key

_BYTE_FEET = 0x01010101  # the lowest bit of each byte of a word
_QUAD_SIGNS = (7, 15, 3, 11)  # the sign of each lane in a quad's index; what is no sign is at 4 * lane
_QUAD_INDICES = {1: 0x10000, 2: 0x3334, 3: 0x7778, 4: 0x10000}
_WIDE = {1: torch.int32, 4: torch.complex128}  # bytes of an entry -> dtype as wide as four of them


def page_bytes(bits: int, channels: int) -> int:
    """Bytes of one page of `channels` channels at `bits` bits a code: 128 * bits * channels / 8.

    Raises:
        UnsupportedBitsError: no page stores this width.
        InvalidInputError: `channels` is not a positive multiple of 4.

    >>> page_bytes(3, 128)
    6144
    """
    if bits not in PARTS:
        raise UnsupportedBitsError(f"cannot pack codes of {bits!r} bits; use one of {tuple(PARTS)}")
    if channels <= 0 or channels % 4:
        raise InvalidInputError(f"a page needs a positive multiple of 4 channels, got {channels}")
    return PAGE_TOKENS // 8 * bits * channels


def pack_pages(codes: Tensor, bits: int, role: str, *, checked: bool = False) -> Tensor:
    """Pack codes into pages.

    Args:
        codes: [..., P, 128, C] uint8, each below 2**bits.
        bits: code width, one of 1, 2, 3, 4, 8.
        role: "key" or "value".
        checked: the codes are known to fit, so that nobody needs to wait for the device to see it.

    Returns:
        [..., P, page_bytes(bits, C)] uint8.

    Raises:
        InvalidInputError: `role` is neither, `codes` has the wrong dtype or shape, or a code needs more bits.
        UnsupportedBitsError: no page stores this width.
    """
    if codes.dtype != torch.uint8 or codes.dim() < 2 or codes.shape[-2] != PAGE_TOKENS:
        wanted = f"uint8 [..., {PAGE_TOKENS}, C]"
        raise InvalidInputError(f"codes must be {wanted}, got {codes.dtype} {tuple(codes.shape)}")
    lead, channels = codes.shape[:-2], codes.shape[-1]
    size = _checked_size(bits, channels, role)
    if not codes.numel():
        return codes.new_empty(*lead, size)
    if not checked and int(codes.max()) >= 1 << bits:
        raise InvalidInputError(f"code {int(codes.max())} does not fit into {bits} bits")
    rows = codes if role == "key" else codes.transpose(-1, -2)
    words = rows.contiguous().view(torch.int32)  # four lanes, one code a byte
    parts, pages = PARTS[bits], prod(lead)
    run = PAGE_TOKENS // parts // 4 * (channels if role == "key" else 1)  # words of one part in a row
    packed = _pack_parts(words.view(-1, parts, run), bits)  # [planes, ..., run]
    if role == "key":
        width = block_channels(channels)
        planes = packed.view(-1, pages, PAGE_TOKENS // parts, channels // width, width // 4)
    else:
        planes = packed.view(-1, pages, channels, run)
    stored = planes.transpose(2, 3).transpose(0, 1)
    return stored.reshape(*lead, -1).view(torch.uint8)


def block_channels(channels: int) -> int:
    """W, the number of neighbouring channels of a key that lie together."""
    return BLOCK_CHANNELS if channels % BLOCK_CHANNELS == 0 else channels


def _pack_parts(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, parts, words] int32, one lane a byte -> packed words [planes, N, words]."""
    parts = codes.unbind(1)
    if bits == 8:
        return codes.transpose(0, 1)
    packed = codes.new_zeros(3 if bits == 3 else 1, *parts[0].shape)
    for p, code in enumerate(parts):
        if bits == 2:
            packed[0] |= _nibbles(code) << (16 * (p // 2) + 2 * (p % 2))
        elif bits == 3 and p < 6:
            packed[p // 2] |= _nibbles(code) << (16 * (p % 2))
        elif bits == 3:
            for k, plane in enumerate(packed):
                plane |= _nibbles((code >> k) & _BYTE_FEET) << (16 * (p - 6) + 3)
        else:
            negative = (~code >> (bits - 1)) & _BYTE_FEET
            packed[0] |= negative << (7 - (4 * p if bits == 4 else p))
            if bits == 4:
                packed[0] |= _nibbles((code ^ (negative * 7)) & (7 * _BYTE_FEET)) << (16 * p)
    return packed


def unpack_pages(packed: Tensor, bits: int, channels: int, role: str) -> Tensor:
    """Undo `pack_pages`.

    Args:
        packed: [..., P, page_bytes] uint8.
        bits: code width.
        channels: C.
        role: "key" or "value".

    Returns:
        Codes [..., P, 128, C] uint8.

    Raises:
        InvalidInputError: `role` is neither, or `packed` has not the size of such pages.
        UnsupportedBitsError: no page stores this width.
    """
    _checked_size(bits, channels, role)
    table = page_table(torch.arange(1 << bits, dtype=torch.uint8, device=packed.device), bits)
    codes = read_pages(packed, table, bits, channels, role)
    return codes.reshape(*packed.shape[:-1], PAGE_TOKENS, channels)


def page_table(entries: Tensor, bits: int) -> Tensor:
    """The table with which `read_pages` turns codes into entries.

    Args:
        entries: [2**bits] uint8 or float32, the entry of each code.
        bits: code width, one of 1, 2, 3, 4, 8.

    Returns:
        For each index of a quad one element as wide as four entries; for 8 bits `entries` itself.
    """
    if bits == 8:
        return entries
    quads = entries[_quad_codes(bits).to(entries.device)]
    return quads.view(_WIDE[entries.element_size()]).squeeze(-1)


def read_pages(packed: Tensor, table: Tensor, bits: int, channels: int, role: str) -> Tensor:
    """Look up every code of some pages.

    Args:
        packed: [..., page_bytes] uint8.
        table: what `page_table` returned.
        bits: code width.
        channels: C.
        role: "key" or "value".

    Returns:
        [..., parts, 128 / parts, C] uint8 or float32, the tokens in order over two dimensions. For keys the
        last two dimensions are contiguous, for values their transpose is.

    Raises:
        InvalidInputError: `role` is neither, or `packed` has not the size of such pages.
        UnsupportedBitsError: no page stores this width.
    """
    size = _checked_size(bits, channels, role)
    if packed.dtype != torch.uint8 or packed.dim() < 1 or packed.shape[-1] != size:
        wanted = f"uint8 [..., {size}] for {bits} bits and {channels} channels"
        raise InvalidInputError(f"pages must be {wanted}, got {packed.dtype} {tuple(packed.shape)}")
    lead, parts = packed.shape[:-1], PARTS[bits]
    tokens = PAGE_TOKENS // parts
    words = _in_order(packed.reshape(-1, size).view(torch.int32), bits, channels, role)
    index = words.view(-1).view(torch.uint8).int() if bits == 8 else _quad_indices(words, bits)
    found = table.index_select(0, index.view(-1))
    if bits < 8:
        found = found.view(torch.uint8 if table.dtype == torch.int32 else torch.float32)
    if role == "key":
        found = found.view(parts, prod(lead), tokens, channels)
    else:
        found = found.view(parts, prod(lead), channels, tokens).transpose(-1, -2)
    return found.transpose(0, 1).view(*lead, parts, tokens, channels)


def _in_order(words: Tensor, bits: int, channels: int, role: str) -> Tensor:
    """Stored words [N, words] -> [planes, N, ...], each plane of keys [R, C / 4], of values [C, R / 4]."""
    planes, rows = 3 if bits == 3 else 1, PAGE_TOKENS // PARTS[bits]
    if role == "value":
        stored = words.view(len(words), planes, rows // 4, channels)
    else:
        width = block_channels(channels)
        stored = words.view(len(words), planes, channels // width, rows, width // 4)
    return stored.transpose(2, 3).transpose(0, 1).contiguous()


def _quad_indices(words: Tensor, bits: int) -> Tensor:
    """[planes, ...] int32 words -> [parts, ...] int32 indices of quads."""
    if bits == 4:
        word, index = words[0], words.new_empty(2, *words.shape[1:])
        torch.bitwise_and(word, 0xF7F7, out=index[0]).bitwise_or_((word >> 20).bitwise_and_(0x0808))
        torch.bitwise_and(word >> 16, 0x7F7F, out=index[1]).bitwise_or_((word << 4).bitwise_and_(0x8080))
        return index
    part = torch.arange(PARTS[bits], dtype=torch.int32, device=words.device)
    part = part.view(-1, *[1] * (words.dim() - 1))
    if bits == 2:
        return words.bitwise_right_shift(part // 2 * 16 + part % 2 * 2).bitwise_and_(0x3333)
    if bits == 1:
        first, second = words.bitwise_left_shift(part), words.bitwise_right_shift(20 - part)
        return first.bitwise_and_(0x8080).bitwise_or_(second.bitwise_and_(0x0808))
    index = words.new_empty(8, *words.shape[1:])
    index[0:6:2], index[1:6:2] = words & 0x7777, (words >> 16).bitwise_and_(0x7777)
    for half in range(2):
        spare = (words >> (16 * half + 3)).bitwise_and_(0x1111)
        index[6 + half] = spare[0] | (spare[1] << 1) | (spare[2] << 2)
    return index


@kept
def _quad_codes(bits: int) -> Tensor:
    """[indices, 4] int64: the codes of the four lanes that an index from `_quad_indices` stands for."""
    half = (1 << (bits - 1)) - 1
    lanes = []
    index = torch.arange(_QUAD_INDICES[bits], device="cpu")
    for lane, sign_bit in enumerate(_QUAD_SIGNS):
        field = index >> (4 * lane)
        negative = (index >> sign_bit) & 1
        signed = ((field & half) ^ (negative * half)) + (1 - negative) * (half + 1)
        lanes.append(field & (2 * half + 1) if bits in (2, 3) else signed)
    return torch.stack(lanes, dim=-1)


def _nibbles(words: Tensor) -> Tensor:
    """Move the low nibbles of the four bytes of a word into its low half."""
    pairs = (words | (words >> 4)) & 0x00FF00FF
    return (pairs | (pairs >> 8)) & 0xFFFF


def _checked_size(bits: int, channels: int, role: str) -> int:
    if role not in ROLES:
        raise InvalidInputError(f"role must be one of {ROLES}, got {role!r}")
    return page_bytes(bits, channels)


def gather_rows(pages: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Rows of pages [B, Hkv, P, 128, C] at tokens [B, Hkv, N] -> [B, Hkv, N / 128, 128, C]."""
    index = tokens.unsqueeze(-1).expand(-1, -1, -1, pages.shape[-1])
    rows = pages.flatten(2, 3).gather(2, index)
    return rows.view(*rows.shape[:2], -1, PAGE_TOKENS, rows.shape[-1])
