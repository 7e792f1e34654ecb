"""From packed codes to int8 levels inside a kernel: by byte permutations on a GPU, by plain loads elsewhere.

The layout of `quantpress.kernels.layout` puts the fields of four neighbouring values where one `prmt.b32`
expects its selectors, so a codebook of up to eight levels (or eight magnitudes and a sign) is a lookup in two
registers. A level 2 * b + 1 is held as the byte b: its negative, -2 * b - 1, is the complement of b. A code
of 8 bits is b + 128, so that one `xor` makes bytes of four codes.
"""

import math

import torch
import triton
import triton.language as tl

from quantpress.kept import kept
from quantpress.quantization.codebook import Codebook

LANES = 32
FINE = 1 / 256
"""What a fine level counts, in units of the coarse ones."""


@kept
def lookup_table(keys: Codebook | None, values: Codebook | None, device: torch.device) -> torch.Tensor:
    """The registers in which the assembly below looks levels up.

    Args:
        keys: the int8 codebook of keys, of 2, 3, 4 or 8 bits; None: bit planes, which need no lookup.
        values: that of values.
        device: device of the table.

    Returns:
        [4, 32] int32: a row for each register, two for keys and two for values, and a column for each lane.
        [8, 32] where some levels are of two bytes: as many rows for the fine ones. Cached and shared: do not
        write to it.
    """
    rows = []
    pairs = [bytes_of_levels(book) for book in (keys, values)]
    parts = [coarse for coarse, _ in pairs]
    if any(fine for _, fine in pairs):
        parts += [fine for _, fine in pairs]
    for levels in parts:
        if len(levels) == 16:  # magnitudes only
            levels = levels[len(levels) // 2 :]
        elif len(levels) == 256:  # what makes codes bytes: b = -128 four times
            levels = levels[:1] * 4
        held = [(level - 1) // 2 & 0xFF for level in levels] + [0] * (8 - len(levels))
        rows += [sum(byte << (8 * i) for i, byte in enumerate(held[at : at + 4])) for at in (0, 4)]
    words = torch.tensor(rows, dtype=torch.int64, device="cpu").to(torch.int32)  # wraps to the same bits
    return words[:, None].expand(-1, LANES).contiguous().to(device)


def bytes_of_levels(book: Codebook | None) -> tuple[list[int], list[int]]:
    """Levels as odd whole numbers: a coarse one each, and where they are not whole a fine one for the rest.

    The fine ones count in `FINE` of the coarse unit, of which the largest level has 255. So a level is off by
    half of a fine unit at most, 2 ** -16 of the largest.
    """
    if book is None or book.form == "int8":
        return [] if book is None else [int(level) for level in book.scaled], []
    exact = [level * (255 / book.scaled[-1]) for level in book.scaled[len(book.scaled) // 2 :]]
    coarse = [_odd(level) for level in exact]
    fine = [_odd((level - own) / FINE) for level, own in zip(exact, coarse, strict=True)]
    return _symmetric(coarse), _symmetric(fine)


def _odd(number: float) -> int:
    """The nearest odd whole number that a byte holds."""
    return min(max(2 * math.floor(number / 2) + 1, -255), 255)


def _symmetric(positive: list[int]) -> list[int]:
    """The numbers of negative levels and those of positive ones."""
    return [-number for number in reversed(positive)] + positive


# Operands: first the outputs, then each packed word four times (once for each byte of the output), then the
# two registers of the table, four times each.
LOOKUP_4 = tl.constexpr("""{ .reg .b32 t, u, s;
and.b32 t, $2, 0x77777777;
prmt.b32 u, $6, $10, t;
prmt.b32 s, $2, $2, 0xba98;
xor.b32 $0, u, s;
shr.u32 t, t, 16;
prmt.b32 u, $6, $10, t;
shl.b32 s, $2, 4;
prmt.b32 s, s, s, 0xba98;
xor.b32 $1, u, s; }""")
"""4 bits: one word in, parts 0 and 1 out. `prmt` 0xba98 repeats the sign of each byte over the byte."""

LOOKUP_2 = tl.constexpr("""{ .reg .b32 t, u;
and.b32 t, $4, 0x33333333;
shr.u32 u, $4, 2;
and.b32 u, u, 0x33333333;
prmt.b32 $0, $8, $8, t;
prmt.b32 $1, $8, $8, u;
shr.u32 t, t, 16;
shr.u32 u, u, 16;
prmt.b32 $2, $8, $8, t;
prmt.b32 $3, $8, $8, u; }""")
"""2 bits: one word in, parts 0 to 3 out."""

LOOKUP_3 = tl.constexpr("""{ .reg .b32 t, u;
and.b32 t, $8, 0x77777777;
prmt.b32 $0, $20, $24, t;
shr.u32 t, t, 16;
prmt.b32 $1, $20, $24, t;
and.b32 t, $12, 0x77777777;
prmt.b32 $2, $20, $24, t;
shr.u32 t, t, 16;
prmt.b32 $3, $20, $24, t;
and.b32 t, $16, 0x77777777;
prmt.b32 $4, $20, $24, t;
shr.u32 t, t, 16;
prmt.b32 $5, $20, $24, t;
shr.u32 t, $8, 3;
and.b32 t, t, 0x11111111;
shr.u32 u, $12, 2;
and.b32 u, u, 0x22222222;
or.b32 t, t, u;
shr.u32 u, $16, 1;
and.b32 u, u, 0x44444444;
or.b32 t, t, u;
prmt.b32 $6, $20, $24, t;
shr.u32 t, t, 16;
prmt.b32 $7, $20, $24, t; }""")
"""3 bits: the words of three planes in, parts 0 to 7 out."""


BYTES = tl.constexpr("""{
xor.b32 $0, $2, $10;
xor.b32 $1, $6, $10; }""")
"""8 bits: two words and one register of the table in, their codes c as bytes c - 128 out.

The register, 0x80808080, comes from shared memory: `_order` of `split_mma` keeps loads before such reads."""

LOOKUP_3_HALF = tl.constexpr("""{ .reg .b32 s, t, u;
shr.u32 s, $4, $24;
and.b32 t, s, 0x7777;
prmt.b32 $0, $16, $20, t;
shr.u32 s, s, 3;
and.b32 s, s, 0x1111;
shr.u32 u, $8, $24;
and.b32 t, u, 0x7777;
prmt.b32 $1, $16, $20, t;
shr.u32 u, u, 2;
and.b32 u, u, 0x2222;
or.b32 s, s, u;
shr.u32 u, $12, $24;
and.b32 t, u, 0x7777;
prmt.b32 $2, $16, $20, t;
shr.u32 u, u, 1;
and.b32 u, u, 0x4444;
or.b32 s, s, u;
prmt.b32 $3, $16, $20, s; }""")
"""3 bits: the words of three planes, the table and a shift, 0 or 16, in; the even or the odd parts out."""


SIGNS = tl.constexpr("""{ .reg .b32 t;
prmt.b32 $0, $8, $8, 0xba98;
shl.b32 t, $8, 1;
prmt.b32 $1, t, t, 0xba98;
shl.b32 t, $8, 2;
prmt.b32 $2, t, t, 0xba98;
shl.b32 t, $8, 3;
prmt.b32 $3, t, t, 0xba98;
shl.b32 t, $8, 4;
prmt.b32 $4, t, t, 0xba98;
shl.b32 t, $8, 5;
prmt.b32 $5, t, t, 0xba98;
shl.b32 t, $8, 6;
prmt.b32 $6, t, t, 0xba98;
shl.b32 t, $8, 7;
prmt.b32 $7, t, t, 0xba98; }""")
"""A bit plane: one word in, parts 0 to 7 out, a byte of -1 where a bit is set and of 0 elsewhere."""

SIGNS_HALF = tl.constexpr("""{ .reg .b32 t;
shl.b32 t, $4, $8;
prmt.b32 $0, t, t, 0xba98;
shl.b32 t, t, 2;
prmt.b32 $1, t, t, 0xba98;
shl.b32 t, t, 2;
prmt.b32 $2, t, t, 0xba98;
shl.b32 t, t, 2;
prmt.b32 $3, t, t, 0xba98; }""")
"""A bit plane: one word and a shift, 0 or 1, in; the even or the odd parts out."""


@triton.jit
def code_at(page_ptr, token, channel, C: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, mask):
    """Codes of a page, of 1 to 4 or 8 bits, one by one: the definition of the layout in plain loads.

    page_ptr: uint8 pointer to the start of a page, or a tile of pointers; token, channel: int32 tiles that
    broadcast; C: channels; VALUES: a page of values, not of keys; mask: which codes to load.
    """
    ROWS: tl.constexpr = 16 if BITS == 3 else 16 * BITS
    part = token // ROWS
    row = token % ROWS
    if VALUES:
        word = (row // 4 * C + channel) * 4
        lane = row % 4 + 0 * channel
    else:
        W: tl.constexpr = 64 if C % 64 == 0 else C
        word = channel // W * (ROWS * W) + row * W + channel % W // 4 * 4
        lane = channel % 4 + 0 * row
    if BITS == 4:
        low = tl.load(page_ptr + word + 2 * part + lane // 2, mask=mask, other=0).to(tl.int32)
        sign = tl.load(page_ptr + word + lane, mask=mask, other=0).to(tl.int32)
        magnitude = (low >> (4 * (lane % 2))) & 7
        code = tl.where(((sign >> (7 - 4 * part)) & 1) == 1, 7 - magnitude, 8 + magnitude)
    elif BITS == 3:
        half = part % 2
        own = tl.minimum(part // 2, 2)
        at = page_ptr + word + 2 * half + lane // 2
        nibble = tl.load(at + own * (16 * C), mask=mask, other=0).to(tl.int32) >> (4 * (lane % 2))
        first = tl.load(at, mask=mask, other=0).to(tl.int32) >> (4 * (lane % 2) + 3)
        second = tl.load(at + 16 * C, mask=mask, other=0).to(tl.int32) >> (4 * (lane % 2) + 3)
        third = tl.load(at + 32 * C, mask=mask, other=0).to(tl.int32) >> (4 * (lane % 2) + 3)
        spare = (first & 1) + 2 * (second & 1) + 4 * (third & 1)
        code = tl.where(part < 6, nibble & 7, spare)
    elif BITS == 1:
        byte = tl.load(page_ptr + word + lane, mask=mask, other=0).to(tl.int32)
        code = 1 - ((byte >> (7 - part)) & 1)
    elif BITS == 8:
        code = tl.load(page_ptr + word + lane, mask=mask, other=0).to(tl.int32)
    else:
        byte = tl.load(page_ptr + word + 2 * (part // 2) + lane // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> (4 * (lane % 2) + 2 * (part % 2))) & 3
    return code
