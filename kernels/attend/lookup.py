"""Packed codes to fp8 levels inside a Triton kernel: byte permutations on a GPU, plain loads elsewhere.

The layout of `quantpress.kernels.layout` puts the fields of four neighbouring values where one `prmt.b32`
wants its selectors, so that a codebook of up to eight magnitudes is a lookup in two registers. Each function
below takes a tile of packed bytes and returns one tile of float8e4nv levels per part. The assembly is made
per codebook, since the levels are immediates in it.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from quantpress.codecs.codebook import Codebook


@lru_cache(maxsize=64)
def lookup_assembly(book: Codebook) -> str:
    """PTX that turns packed words into words of four e4m3 levels.

    Args:
        book: an e4m3 codebook of 2, 3 or 4 bits.

    Returns:
        For 4 bits: one word in, two out. For 2 bits: one in, four out. For 3 bits: the magnitude word, the
        sign word and a mask (all ones where the sign word belongs to an odd part) in, four out.
    """
    levels = torch.tensor(book.scaled, dtype=torch.float32).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    table = levels if book.bits == 2 else levels[len(levels) // 2 :]
    low, high = (sum(byte << (8 * i) for i, byte in enumerate(table[at : at + 4])) for at in (0, 4))
    body = {2: _two_bits, 3: _three_bits, 4: _four_bits}[book.bits]()
    return f"{{ .reg .b32 a, b, t, u, s; mov.b32 a, {low:#x}; mov.b32 b, {high:#x};\n{body}}}"


def _four_bits() -> str:
    return """
    and.b32 t, $2, 0x77777777;
    prmt.b32 u, a, b, t;
    and.b32 s, $2, 0x80808080;
    or.b32 $0, u, s;
    shr.u32 t, t, 16;
    prmt.b32 u, a, b, t;
    shl.b32 s, $2, 4;
    and.b32 s, s, 0x80808080;
    or.b32 $1, u, s;
    """


def _two_bits() -> str:
    return """
    and.b32 t, $4, 0x33333333;
    shr.u32 u, $4, 2;
    and.b32 u, u, 0x33333333;
    prmt.b32 $0, a, a, t;
    prmt.b32 $1, a, a, u;
    shr.u32 t, t, 16;
    shr.u32 u, u, 16;
    prmt.b32 $2, a, a, t;
    prmt.b32 $3, a, a, u;
    """


def _three_bits() -> str:
    lines = ["shl.b32 s, $5, 1;", "xor.b32 s, s, $5;", "and.b32 s, s, $6;", "xor.b32 s, s, $5;"]
    for part in range(4):  # the sign of part p is at bit 7 - 2 * p of each byte of s
        lines += [
            f"shr.u32 t, $4, {16 * (part // 2) + 2 * (part % 2)};",
            "and.b32 t, t, 0x3333;",
            "prmt.b32 u, a, a, t;",
            f"shl.b32 t, s, {2 * part};",
            "and.b32 t, t, 0x80808080;",
            f"or.b32 ${part}, u, t;",
        ]
    return "\n".join(lines)


@triton.jit
def levels4(x, ASM: tl.constexpr):
    """[R, C] uint8 -> two [R, C] float8e4nv, parts 0 and 1."""
    a, b = tl.inline_asm_elementwise(ASM, "=&r,=&r,r", [x], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    return a.to(tl.float8e4nv, bitcast=True), b.to(tl.float8e4nv, bitcast=True)


@triton.jit
def levels2(x, ASM: tl.constexpr):
    """[R, C] uint8 -> four [R, C] float8e4nv, parts 0 to 3."""
    a, b, c, d = tl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,r", [x], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
    )
    return (
        a.to(tl.float8e4nv, bitcast=True),
        b.to(tl.float8e4nv, bitcast=True),
        c.to(tl.float8e4nv, bitcast=True),
        d.to(tl.float8e4nv, bitcast=True),
    )


@triton.jit
def levels3(x, sign, odd, ASM: tl.constexpr):
    """[R, C] uint8 magnitudes, signs, 255 where a sign is an odd part's -> four [R, C] float8e4nv."""
    a, b, c, d = tl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,r,r,r",
        [x, sign, odd],
        dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
        is_pure=True,
        pack=4,
    )
    return (
        a.to(tl.float8e4nv, bitcast=True),
        b.to(tl.float8e4nv, bitcast=True),
        c.to(tl.float8e4nv, bitcast=True),
        d.to(tl.float8e4nv, bitcast=True),
    )


@triton.jit
def code_at(page_ptr, token, channel, C: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, mask):
    """Codes of a page, one by one, for any width: the layout's definition in plain loads.

    page_ptr: uint8 pointer (or tile of pointers) to the start of a page; token, channel: broadcastable int32
    tiles.
    """
    if BITS == 3:
        magnitude = _field(page_ptr, token, channel, C, 2, VALUES, mask)
        negative = _field(page_ptr + 32 * C, token, channel, C, 1, VALUES, mask)
        code = tl.where(negative == 1, 3 - magnitude, 4 + magnitude)
    elif BITS == 4:
        field = _field(page_ptr, token, channel, C, 4, VALUES, mask)
        code = tl.where(field >= 8, 7 - (field & 7), 8 + (field & 7))
    elif BITS == 1:
        code = 1 - _field(page_ptr, token, channel, C, 1, VALUES, mask)
    else:
        code = _field(page_ptr, token, channel, C, BITS, VALUES, mask)
    return code


@triton.jit
def _field(plane_ptr, token, channel, C: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr, mask):
    rows: tl.constexpr = 16 * WIDTH
    part = token // rows
    inside = token % rows
    if VALUES:
        word = channel * rows + inside // 4 * 4
        lane = inside % 4 + 0 * channel
    else:
        word = inside * C + channel // 4 * 4
        lane = channel % 4 + 0 * inside
    if WIDTH == 4:
        low = tl.load(plane_ptr + word + 2 * part + lane // 2, mask=mask, other=0).to(tl.int32)
        sign = tl.load(plane_ptr + word + lane, mask=mask, other=0).to(tl.int32)
        field = ((low >> (4 * (lane % 2))) & 7) + 8 * ((sign >> (7 - 4 * part)) & 1)
    elif WIDTH == 2:
        byte = tl.load(plane_ptr + word + 2 * (part // 2) + lane // 2, mask=mask, other=0).to(tl.int32)
        field = (byte >> (4 * (lane % 2) + 2 * (part % 2))) & 3
    elif WIDTH == 1:
        field = (tl.load(plane_ptr + word + lane, mask=mask, other=0).to(tl.int32) >> (7 - part)) & 1
    else:
        field = tl.load(plane_ptr + word + lane, mask=mask, other=0).to(tl.int32)
    return field
