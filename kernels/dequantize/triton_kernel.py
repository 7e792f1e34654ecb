# mypy: allow-untyped-defs
"""Decoding of pages on a GPU (Triton): into code space, or back to vectors in one pass.

A program decodes one channel group of 64 tokens. Each word of the layout is loaded once for the four lanes of
a part (four channels of a key, or four tokens of a value), which are taken apart in registers. The inverse
rotation is a product on 16-bit tensor cores that is as good as float32 (see
`quantpress.kernels.rotation_matrix`); int8 levels are exact in float16, others are split into two parts. The
signs of a sketch are exact, too: their product with the sketch's matrix, rotated back where vectors are
wanted, is another one.
"""

import triton
import triton.language as tl


@triton.jit
def _word_at(token, word, C: tl.constexpr, R: tl.constexpr, VALUES: tl.constexpr):
    """Offsets in a plane of the words of tokens and of columns of words, for parts of R tokens."""
    row = token % R
    if VALUES:
        at = row // 4 * C + word
    elif C % 64 == 0:
        at = word // 16 * (16 * R) + row * 16 + word % 16
    else:
        at = row * (C // 4) + word
    return at


@triton.jit
def _fields(words_ptr, token, word, lane, C: tl.constexpr, BITS: tl.constexpr, VALUES: tl.constexpr, mask):
    """Codes of a page, of four lanes each.

    words_ptr: the page's int32 words; token, word: tiles, with an axis of length 1 where `lane` has its four
    lanes; mask: which words to load.
    """
    R: tl.constexpr = 16 * (1 if BITS == 3 else BITS)
    part = token // R
    at = words_ptr + _word_at(token, word, C, R, VALUES)
    if BITS == 4:
        field = tl.load(at, mask=mask, other=0)
        size = (field >> (16 * part + 4 * lane)) & 7
        code = tl.where(((field >> (8 * lane + 7 - 4 * part)) & 1) == 1, 7 - size, 8 + size)
    elif BITS == 3:
        spare = part >= 6  # a bit from each plane
        shift = 16 * (part % 2) + 4 * lane
        field = tl.load(at + tl.where(spare, 0, part // 2) * (4 * C), mask=mask, other=0) >> shift
        second = tl.load(at + 4 * C, mask=mask & spare, other=0) >> shift
        third = tl.load(at + 8 * C, mask=mask & spare, other=0) >> shift
        bits = ((field >> 3) & 1) + ((second >> 2) & 2) + ((third >> 1) & 4)
        code = tl.where(spare, bits, field & 7)
    elif BITS == 2:
        code = (tl.load(at, mask=mask, other=0) >> (16 * (part // 2) + 4 * lane + 2 * (part % 2))) & 3
    elif BITS == 1:
        code = 1 - ((tl.load(at, mask=mask, other=0) >> (8 * lane + 7 - part)) & 1)
    else:
        code = (tl.load(at, mask=mask, other=0) >> (8 * lane + 0 * part)) & 255
    return code


@triton.jit
def _codes(
    words_ptr,
    first,
    part: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Codes [64, BK] of tokens `first` onwards and channels part * BK onwards.

    words_ptr: the page's words; C: channels of the group. Also which channels there are, [1, BK].
    """
    lane = tl.arange(0, 4)
    if VALUES:
        token = first + 4 * tl.arange(0, 16)[:, None, None]
        word = part * BK + tl.arange(0, BK)[None, None, :]
        code = _fields(words_ptr, token, word, lane[None, :, None], C, BITS, True, word < C)
    else:
        token = first + tl.arange(0, 64)[:, None, None]
        word = part * (BK // 4) + tl.arange(0, BK // 4)[None, :, None]
        code = _fields(words_ptr, token, word, lane[None, None, :], C, BITS, False, word < C // 4)
    inside = part * BK + tl.arange(0, BK) < C
    return tl.reshape(code, [64, BK]), inside[None, :]


@triton.jit
def _levels(
    words_ptr,
    levels_ptr,
    first,
    part: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Levels [64, BK] of `_codes`; zero beyond the group. levels_ptr: [2**BITS] float32."""
    code, inside = _codes(words_ptr, first, part, C, BK, BITS, VALUES)
    return tl.load(levels_ptr + code, mask=inside, other=0.0)


@triton.jit
def _sketched(
    signs_ptr,
    residual_ptr,
    turn_ptr,
    turn_factor,
    first,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    VALUES: tl.constexpr,
):
    """What the sketch adds to tokens `first` onwards: residual norm times signs times `turn`, [64, CP].

    signs_ptr, residual_ptr: of the page; turn: [2, CP, CP] float16, whose unit is `turn_factor`.
    """
    column = tl.arange(0, CP)
    acc = tl.zeros([64, CP], tl.float32)
    for part in tl.static_range(CP // BK):
        code, inside = _codes(signs_ptr, first, part, C, BK, 1, VALUES)
        signs = tl.where(inside, 2 * code - 1, 0).to(tl.float16)
        turn_at = turn_ptr + (part * BK + tl.arange(0, BK))[:, None] * CP + column[None, :]
        acc = tl.dot(signs, tl.load(turn_at + CP * CP), acc)
        acc = tl.dot(signs, tl.load(turn_at), acc)
    norm = tl.load(residual_ptr + first + tl.arange(0, 64)).to(tl.float32)
    return acc * (norm * turn_factor)[:, None]


@triton.jit
def decode_code_space_kernel(
    words_ptr,
    scale_ptr,
    levels_ptr,
    signs_ptr,
    residual_ptr,
    turn_ptr,
    out_ptr,
    pages,
    turn_factor,
    D: tl.constexpr,
    START: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    SKETCH: tl.constexpr,
):
    """Decode half a page (axis 0) of a (batch, KV head) (axis 1) into code space: scale times level.

    words: [B, Hkv, P, page_bytes / 4] int32; scale: [B, Hkv, P, 128]; levels: [2**BITS] float32; out: keys
    [B, Hkv, T, D] or, if VALUES, values [B, Hkv, D, T], float32, written; pages: P; START: first channel of
    the group; C: its channels; CP: padded. If SKETCH, signs and residual, as words and scale, and turn: of
    `_sketched`, BK channels in one product.
    """
    page, head = tl.program_id(0) // 2, tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % 2 * 64
    token = first + tl.arange(0, 64)
    channel = tl.arange(0, CP)
    at = head * pages + page
    levels = _levels(words_ptr + at * (4 * BITS * C), levels_ptr, first, 0, C, CP, BITS, VALUES)
    scale = tl.load(scale_ptr + at * 128 + token).to(tl.float32)
    y = levels * scale[:, None]
    if SKETCH:
        signs_at, norms_at = signs_ptr + at * (4 * C), residual_ptr + at * 128
        y += _sketched(signs_at, norms_at, turn_ptr, turn_factor, first, C, CP, BK, VALUES)
    inside = channel[None, :] < C
    if VALUES:
        out_ptr += (head * D + START) * pages * 128 + page * 128
        target = out_ptr + channel[None, :].to(tl.int64) * (pages * 128) + token[:, None]
    else:
        target = out_ptr + at * (128 * D) + START + token[:, None] * D + channel[None, :]
    tl.store(target, y, mask=inside)


@triton.jit
def decode_pages_kernel(
    words_ptr,
    scale_ptr,
    levels_ptr,
    matrix_ptr,
    mean_ptr,
    weight_ptr,
    order_ptr,
    table_ptr,
    signs_ptr,
    residual_ptr,
    turn_ptr,
    out_ptr,
    pages,
    words_head,
    words_page,
    scale_head,
    scale_page,
    signs_head,
    signs_page,
    residual_head,
    residual_page,
    out_head,
    out_token,
    factor,
    turn_factor,
    D: tl.constexpr,
    START: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    HALVES: tl.constexpr,
    WHOLE: tl.constexpr,
    VALUES: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
    TABLE: tl.constexpr,
    SKETCH: tl.constexpr,
):
    """Decode half a page (axis 0) of a (batch, KV head) (axis 1) to vectors.

    words: int32, scale, and with SKETCH signs and residual, of pages *_page apart in heads *_head apart;
    START, C, CP and SKETCH: as for `decode_code_space_kernel`, with a turn out of code space; pages: P;
    table: [P] int32, which pages, if TABLE, else the first P; levels: in units of the codebook's; matrix:
    [HALVES, CP, CP] float16, out of code space; mean, weight and order: [B * Hkv, D], if MEAN, WEIGHT and
    ORDER; out: vectors [D], written, of tokens out_token apart in heads out_head apart; factor: value of a
    level's unit times one of the matrix; BK: channels in one product; WHOLE: levels are exact in float16.
    """
    page, head = tl.program_id(0) // 2, tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) % 2 * 64
    token = first + tl.arange(0, 64)
    column = tl.arange(0, CP)
    source = page.to(tl.int64)
    if TABLE:
        source = tl.load(table_ptr + page).to(tl.int64)
    words_ptr += head * words_head + source * words_page
    scale_ptr += head * scale_head + source * scale_page
    acc = tl.zeros([64, CP], tl.float32)
    for part in tl.static_range(CP // BK):
        levels = _levels(words_ptr, levels_ptr, first, part, C, BK, BITS, VALUES)
        row = part * BK + tl.arange(0, BK)
        matrix_at = matrix_ptr + row[:, None] * CP + column[None, :]
        high = tl.load(matrix_at)
        big = levels.to(tl.float16)
        if HALVES == 2:
            acc = tl.dot(big, tl.load(matrix_at + CP * CP), acc)
        if not WHOLE:
            acc = tl.dot((levels - big.to(tl.float32)).to(tl.float16), high, acc)
        acc = tl.dot(big, high, acc)
    scale = tl.load(scale_ptr + token).to(tl.float32)
    y = acc * (scale * factor)[:, None]
    if SKETCH:
        signs_ptr += head * signs_head + source * signs_page
        residual_ptr += head * residual_head + source * residual_page
        y += _sketched(signs_ptr, residual_ptr, turn_ptr, turn_factor, first, C, CP, BK, VALUES)
    inside = column < C
    channel = START + column
    if ORDER:
        channel = tl.load(order_ptr + head * D + channel, mask=inside, other=0).to(tl.int32)
    if WEIGHT:
        y = y / tl.load(weight_ptr + head * D + channel, mask=inside, other=1.0)[None, :]
    if MEAN:
        y = y + tl.load(mean_ptr + head * D + channel, mask=inside, other=0.0)[None, :]
    out_ptr += head * out_head + page.to(tl.int64) * 128 * out_token
    tl.store(
        out_ptr + token[:, None] * out_token + channel[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=inside[None, :],
    )
