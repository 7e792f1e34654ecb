# mypy: allow-untyped-defs
"""Encoding of whole pages on a GPU (Triton): transform, rotate, round, scale and pack in one pass.

A program encodes `per` pages of one (batch, KV head), in tiles of 64 tokens. The rotation is a product on
16-bit tensor cores that is as good as float32: the matrix has only +1 and -1 (its factor drops out of y /
|y|) or is split into two float16 parts, and so are the vectors. There are three modes:

    RAW      16-bit vectors without a transform, as they are
    QUICK    vectors times 2**6: float16 parts are as good as float32 from norms of 2**-8, coordinates to 2**9
    CAREFUL  each vector times a power of two that brings its largest coordinate near 2**14: any length

The first two report vectors that are out of their range; the pages are then encoded again with the third.

Tokens are assigned to rows of a tile, and channels to columns, so that the fields of one packed word meet in
one thread as far as possible. In bits, row g1 g0 h v2 v1 v0 of tile q holds token

    keys    q h v2 g1 g0 v1 v0      words join the parts (q and h, then v2) and four channels
    values  q v1 v2 g1 g0 v0 h      words join the parts (q, v1, v2) and four tokens (v0 h)

and column 16 g + 8 h + 2 t + s holds channel 16 g + 4 t + 2 h + s of a key. At 3 bits, q and the next bit say
which plane holds the two parts that the third bit tells apart; parts 6 and 7 are spread over all planes in
the end.
"""

import triton
import triton.language as tl

_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_LITTLE = tl.constexpr(2.0**-100)  # RAW takes squared norms from here ...
_LARGE = tl.constexpr(2.0**100)  # ... to here
_SHORT = tl.constexpr(2.0**-8)  # QUICK is as good as float32 for norms from here on
STEEP = tl.constexpr(2.0**60)  # what the assembly multiplies comparisons by
QUICK_UNIT = tl.constexpr(2.0**6)
CAREFUL = tl.constexpr(0)
QUICK = tl.constexpr(1)
RAW = tl.constexpr(2)


@triton.jit
def tile_token(tile: tl.constexpr, VALUES: tl.constexpr):
    """The tokens [64] of the page that are the rows of a tile."""
    row = tl.arange(0, 64)
    if VALUES:
        lane = 2 * (row & 1) + ((row >> 3) & 1)
        token = 32 * ((row >> 1) & 1) + 16 * ((row >> 2) & 1) + 4 * (row >> 4) + lane
    else:
        token = 32 * ((row >> 3) & 1) + 16 * ((row >> 2) & 1) + 4 * (row >> 4) + (row & 3)
    return 64 * tile + token


@triton.jit
def tile_channel(CP: tl.constexpr, VALUES: tl.constexpr):
    """The channels [CP] that are the columns of a tile."""
    column = tl.arange(0, CP)
    if VALUES:
        channel = column
    else:
        channel = (column // 16) * 16 + 4 * ((column >> 1) & 3) + 2 * ((column >> 3) & 1) + (column & 1)
    return channel


@triton.jit
def _vectors(
    x_ptr,
    stride,
    mean_ptr,
    weight_ptr,
    order_ptr,
    token,
    part: tl.constexpr,
    START: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    MODE: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Channels part * BK onwards of a group, [64, BK], as stored (RAW) or transformed to float32.

    x_ptr: the page's vectors, `stride` apart; mean_ptr, weight_ptr, order_ptr: of this head, if MEAN, WEIGHT
    and ORDER; token: [64]; START: first channel of the group; C: its channels.
    """
    column = part * BK + tl.arange(0, BK)
    inside = column < C
    channel = START + column
    if ORDER:
        channel = tl.load(order_ptr + channel, mask=inside, other=0).to(tl.int32)
    x = tl.load(x_ptr + token[:, None] * stride + channel[None, :], mask=inside[None, :], other=0.0)
    if MODE != RAW:
        x = x.to(tl.float32)
        if MEAN:
            x = x - tl.load(mean_ptr + channel, mask=inside, other=0.0)[None, :]
        weight = tl.full([BK], 1.0, tl.float32)
        if WEIGHT:
            weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
        if MODE == QUICK:
            weight = weight * QUICK_UNIT
        if WEIGHT or MODE == QUICK:
            x = x * weight[None, :]
    return x


@triton.jit
def load_matrix(matrix_ptr, half: tl.constexpr, part: tl.constexpr, BK: tl.constexpr, CP: tl.constexpr):
    """Rows part * BK onwards of one half of the rotation, [BK, CP]."""
    row = part * BK + tl.arange(0, BK)
    return tl.load(matrix_ptr + (half * CP + row[:, None]) * CP + tl.arange(0, CP)[None, :])


@triton.jit
def held(matrix_ptr, half: tl.constexpr, HALVES: tl.constexpr, BK: tl.constexpr, CP: tl.constexpr):
    """One half of the rotation [CP, CP] if the program keeps it over all pages; else 0, which is not used."""
    if BK == CP and half < HALVES:  # noqa: SIM108
        matrix = load_matrix(matrix_ptr, half, 0, CP, CP)
    else:
        matrix = 0
    return matrix


@triton.jit
def split_dot(x, high, low, acc, HALVES: tl.constexpr):
    """acc + x (high + low), x float32 in two float16 parts; the product of both small parts is left out."""
    big = x.to(tl.float16)
    small = (x - big.to(tl.float32)).to(tl.float16)
    acc = tl.dot(small, high, acc)
    if HALVES == 2:
        acc = tl.dot(big, low, acc)
    return tl.dot(big, high, acc)


@triton.jit
def rotated(
    x_ptr,
    stride,
    mean_ptr,
    weight_ptr,
    order_ptr,
    matrix_ptr,
    high,
    low,
    token,
    START: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    HALVES: tl.constexpr,
    MODE: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Rotated vectors [64, CP] float32, and the factor [64] that undoes the power of two of CAREFUL.

    The arguments are those of `_vectors` and `encode_page`.
    """
    acc = tl.zeros([64, CP], tl.float32)
    undo = tl.full([64], 1.0, tl.float32)
    if MODE != CAREFUL:
        for part in tl.static_range(CP // BK):
            x = _vectors(
                x_ptr,
                stride,
                mean_ptr,
                weight_ptr,
                order_ptr,
                token,
                part,
                START,
                C,
                BK,
                MODE,
                MEAN,
                WEIGHT,
                ORDER,
            )
            if BK < CP:
                high = load_matrix(matrix_ptr, 0, part, BK, CP)
                low = high
                if HALVES == 2:
                    low = load_matrix(matrix_ptr, 1, part, BK, CP)
            if MODE == RAW:  # noqa: SIM108
                acc = tl.dot(x, high, acc)
            else:
                acc = split_dot(x, high, low, acc, HALVES)
    else:
        peak = tl.zeros([64], tl.float32)
        for part in tl.static_range(CP // BK):
            x = _vectors(
                x_ptr,
                stride,
                mean_ptr,
                weight_ptr,
                order_ptr,
                token,
                part,
                START,
                C,
                BK,
                MODE,
                MEAN,
                WEIGHT,
                ORDER,
            )
            peak = tl.maximum(peak, tl.max(tl.abs(x), 1))
        exponent = tl.minimum(tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 15), 254)
        factor = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        undo = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        for part in tl.static_range(CP // BK):
            if BK < CP:
                x = _vectors(
                    x_ptr,
                    stride,
                    mean_ptr,
                    weight_ptr,
                    order_ptr,
                    token,
                    part,
                    START,
                    C,
                    BK,
                    MODE,
                    MEAN,
                    WEIGHT,
                    ORDER,
                )
            if BK < CP:
                high = load_matrix(matrix_ptr, 0, part, BK, CP)
                low = high
                if HALVES == 2:
                    low = load_matrix(matrix_ptr, 1, part, BK, CP)
            acc = split_dot(x * factor[:, None], high, low, acc, HALVES)
    return acc, undo


@triton.jit
def plain_fields(u, shift, sign, table_ptr, cells, BOOK: tl.constexpr, BITS: tl.constexpr):
    """The fields of `rounding_assembly`, for any width and without assembly, and the magnitudes of levels.

    u: coordinates; shift, sign: of the fields; BOOK: the positive thresholds, then the positive levels. At 8
    bits these are gaps of an even grid per unit, and half a gap; or BOOK is empty, and table_ptr has 256
    thresholds, 256 levels, origin and pitch of a grid, and for each of its `cells` how many thresholds lie
    below it.
    """
    a = tl.abs(u)
    negative = u <= 0
    signs = tl.where(negative, sign, 0)
    field = tl.zeros(u.shape, tl.int32)
    if BITS == 8 and len(BOOK) > 0:
        gap = tl.minimum(tl.maximum(tl.ceil(u * BOOK[0]), -127.0), 128.0)
        level = tl.abs(2.0 * gap - 1.0) * BOOK[1]
        field = (gap.to(tl.int32) + 127) << (shift + field)
    elif BITS == 8:
        at = (u - tl.load(table_ptr + 512)) * tl.load(table_ptr + 513)
        cell = tl.minimum(tl.where(at > 0.0, at, 0.0), cells - 1.0).to(tl.int32)  # 0 for NaN
        code = tl.load(table_ptr + 514 + cell).to(tl.int32)
        code += (u > tl.load(table_ptr + code)).to(tl.int32)
        level = tl.abs(tl.load(table_ptr + 256 + code))
        field = code << (shift + field)
    else:
        HALF: tl.constexpr = 2 ** (BITS - 1)
        level = tl.full(u.shape, BOOK[HALF - 1], tl.float32)
        for i in tl.static_range(HALF - 1):
            above = a > BOOK[i]
            field += above.to(tl.int32)
            level = tl.where(above, BOOK[HALF + i], level)
        if BITS == 4:
            field = (field << shift) + signs
        elif BITS == 1:
            field = signs
        else:
            field = tl.where(negative, HALF - 1 - field, HALF + field) << shift
    return field, level


@triton.jit
def join_fields(field, CP: tl.constexpr, VALUES: tl.constexpr):
    """Add up fields of a word that meet in a thread: keys to [64, CP / 4], values to [32, CP] of rows g v."""
    if VALUES:
        field = tl.reshape(tl.sum(tl.reshape(field, [4, 2, 8, CP]), 1), [32, CP])
    else:
        field = tl.sum(tl.reshape(field, [64, CP // 16, 2, 4, 2]), 4)
        field = tl.reshape(tl.sum(field, 2), [64, CP // 4])
    return field


@triton.jit
def _word_at(row, C: tl.constexpr, CP: tl.constexpr, R: tl.constexpr, VALUES: tl.constexpr):
    """Offsets in a plane of the words of rows (keys) or quads (values) [n], parts of R tokens: [n, words]."""
    if VALUES:
        at = row[:, None] * C + tl.arange(0, CP)[None, :]
    else:
        WORDS: tl.constexpr = 16 if C % 64 == 0 else C // 4  # of a block
        word = tl.arange(0, CP // 4)
        if C % 64 == 0:
            word = word // WORDS * (R * WORDS) + word % WORDS
        at = row[:, None] * WORDS + word[None, :]
    return at


@triton.jit
def _inside(C: tl.constexpr, CP: tl.constexpr, VALUES: tl.constexpr):
    """Whether a column of words belongs to the group, [1, words]."""
    word = tl.arange(0, CP if VALUES else CP // 4)
    return (word < (C if VALUES else C // 4))[None, :]


@triton.jit
def store_words(
    words_ptr,
    field,
    tile: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Add up the rest of a plane's fields, at width 8 of one tile, and store its words; not for width 3."""
    if VALUES:
        ROWS: tl.constexpr = 16 if WIDTH >= 4 else 4 * WIDTH
        word = tl.sum(tl.reshape(field, [ROWS, 32 // ROWS, CP]), 1)
        row = tl.arange(0, ROWS)
        if WIDTH == 8:
            row = 16 * tile + 8 * (row & 1) + 4 * ((row >> 1) & 1) + (row >> 2)
        elif WIDTH == 4:
            row = 8 * (row & 1) + 4 * ((row >> 1) & 1) + (row >> 2)
        elif WIDTH == 2:
            row = 4 * (row & 1) + (row >> 1)
    elif WIDTH >= 4:
        word = field
        row = tile_token(tile if WIDTH == 8 else 0, False)
    elif WIDTH == 2:
        word = tl.reshape(tl.sum(tl.reshape(field, [4, 2, 8, CP // 4]), 1), [32, CP // 4])
        row = tl.arange(0, 32)
        row = 16 * ((row >> 2) & 1) + 4 * (row >> 3) + (row & 3)
    else:
        word = tl.sum(tl.reshape(field, [4, 2, 2, 4, CP // 4]), 2)
        word = tl.reshape(tl.sum(word, 1), [16, CP // 4])
        row = tl.arange(0, 16)
    words_at = words_ptr + _word_at(row, C, CP, 16 * WIDTH, VALUES)
    tl.store(words_at, word, mask=_inside(C, CP, VALUES))


@triton.jit
def join_pairs(field, CP: tl.constexpr, VALUES: tl.constexpr):
    """At 3 bits: words of a tile with parts 2 k and 2 k + 1 of two k, [4, 2 (k), n, words]."""
    if VALUES:
        word = tl.sum(tl.reshape(field, [4, 2, 2, 2, CP]), 3)
        word = tl.reshape(tl.sum(word, 1), [4, 2, 1, CP])
    else:
        word = tl.sum(tl.reshape(field, [4, 2, 2, 4, CP // 4]), 2)
    return word


@triton.jit
def store_planes(words_ptr, first, second, C: tl.constexpr, CP: tl.constexpr, VALUES: tl.constexpr):
    """At 3 bits: spread the last two parts over the words of the others, and store them.

    first, second: of `join_pairs` for both tiles.
    """
    ROWS: tl.constexpr = 1 if VALUES else 4
    WORDS: tl.constexpr = CP if VALUES else CP // 4
    pair = tl.arange(0, 2)[None, :, None, None]
    last = tl.sum(tl.where(pair == 1, second, 0), 1)[:, None]
    first += ((last >> pair) & 0x11111111) << 3
    second += ((last >> 2) & 0x11111111) << 3
    row = tl.arange(0, 8 * ROWS)
    plane = row // ROWS % 2
    words_at = words_ptr + _word_at(row // (2 * ROWS) * ROWS + row % ROWS, C, CP, 16, VALUES)
    inside = _inside(C, CP, VALUES)
    tl.store(words_at + plane[:, None] * (4 * C), tl.reshape(first, [8 * ROWS, WORDS]), mask=inside)
    inside = inside & (plane == 0)[:, None]
    tl.store(words_at + 8 * C, tl.reshape(second, [8 * ROWS, WORDS]), mask=inside)


@triton.jit
def encode_page(
    x_ptr,
    stride,
    mean_ptr,
    weight_ptr,
    order_ptr,
    matrix_ptr,
    high,
    low,
    table_ptr,
    cells,
    words_ptr,
    scale_ptr,
    flag_ptr,
    largest,
    norm_factor,
    BOOK: tl.constexpr,
    ASM: tl.constexpr,
    SQUARES: tl.constexpr,
    UNIT: tl.constexpr,
    START: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    HALVES: tl.constexpr,
    RULE: tl.constexpr,
    MODE: tl.constexpr,
    VALUES: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Encode one page of one channel group; x, words and scale point to the start of the page.

    high, low: of `held`; norm_factor: factor of the group; ASM, SQUARES: assembly, or ""; UNIT: unit of the
    sums; the other arguments are those of `encode_pages_kernel` and `_vectors`.
    """
    channel = tile_channel(CP, VALUES)
    for tile in tl.static_range(2):
        token = tile_token(tile, VALUES)
        y, undo = rotated(
            x_ptr,
            stride,
            mean_ptr,
            weight_ptr,
            order_ptr,
            matrix_ptr,
            high,
            low,
            token,
            START,
            C,
            CP,
            BK,
            HALVES,
            MODE,
            MEAN,
            WEIGHT,
            ORDER,
        )
        square = tl.sum(y * y, 1)
        norm = tl.sqrt(square)
        length = norm * norm_factor
        in_range = square < float("inf")  # false for NaN too
        if MODE != CAREFUL:
            if MODE == RAW:
                in_range = square < _LARGE
                enough = square > _LITTLE
            else:
                enough = length > _SHORT
            if scale_ptr.dtype.element_ty == tl.float16:  # what vanishes here has scale 0
                enough = enough | (square == 0)
            in_range = in_range & enough
        tl.store(flag_ptr + 0 * token, 1 if MODE == CAREFUL else 2, mask=in_range == 0)
        over = 1.0 / tl.where(square > 0, norm, 1.0)
        lane = token[:, None] % 4 if VALUES else channel[None, :] % 4
        if BITS == 4:
            first = 16 * (token // 64)
        elif BITS == 3:
            first = 16 * (token // 16 % 2)
        else:
            first = 16 * (token // 64) + 2 * (token // 32 % 2)
        shift = 8 * lane if BITS == 8 else first[:, None] + 4 * lane
        if BITS == 4:
            sign = 1 << (8 * lane + 7 - 4 * tile)
        elif BITS == 1:
            sign = 1 << (8 * lane + 7 - token[:, None] // 16)
        else:
            sign = shift
        if ASM != "":
            field, each = tl.inline_asm_elementwise(
                ASM,
                "=&r,=&f,f,r,r,f",
                [y, shift, sign, (over * STEEP)[:, None]],
                dtype=(tl.int32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            u = y * over[:, None]
            field, level = plain_fields(u, shift, sign, table_ptr, cells, BOOK, BITS)
            each = level * level if RULE == 1 else level * tl.abs(u)
        word = join_fields(field, CP, VALUES)
        if SQUARES != "":
            each = tl.inline_asm_elementwise(
                SQUARES,
                "=r,r,r",
                [word, tl.broadcast_to(first[:, None], word.shape)],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
            column = tl.arange(0, CP // 4)
            stretch = tl.sum(tl.where(column[None, :] < C // 4, each, 0), 1).to(tl.float32) * UNIT
        elif CP != C:
            stretch = tl.sum(tl.where(channel[None, :] < C, each, 0.0), 1) * UNIT
        else:
            stretch = tl.sum(each, 1) * UNIT
        if RULE == 0:
            stretch = tl.full([64], 1.0, tl.float32)
        elif RULE == 1:
            stretch = tl.sqrt(stretch)
        elif ASM != "":
            stretch = stretch * over
        scale = tl.minimum(length * undo, _FLOAT32_MAX) / tl.where(stretch == 0, 1.0, stretch)
        tl.store(scale_ptr + token, tl.minimum(scale, largest).to(scale_ptr.dtype.element_ty))
        if BITS == 8:
            store_words(words_ptr, word, tile, C, CP, 8, VALUES)
        elif BITS == 3 and tile == 0:
            words = join_pairs(word, CP, VALUES)
        elif BITS == 3:
            store_planes(words_ptr, words, join_pairs(word, CP, VALUES), C, CP, VALUES)
        elif tile == 0:
            words = word
        else:
            store_words(words_ptr, words + word, 0, C, CP, BITS, VALUES)


@triton.jit
def encode_pages_kernel(
    x_ptr,
    mean_ptr,
    weight_ptr,
    order_ptr,
    flag_ptr,
    after_ptr,
    matrix0_ptr,
    table0_ptr,
    words0_ptr,
    scale0_ptr,
    matrix1_ptr,
    table1_ptr,
    words1_ptr,
    scale1_ptr,
    stride_b,
    stride_h,
    stride_t,
    heads,
    pages,
    per,
    cells0,
    cells1,
    largest,
    factor0,
    factor1,
    BOOK0: tl.constexpr,
    BOOK1: tl.constexpr,
    ASM0: tl.constexpr,
    ASM1: tl.constexpr,
    SQUARES0: tl.constexpr,
    SQUARES1: tl.constexpr,
    UNIT0: tl.constexpr,
    UNIT1: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    CP0: tl.constexpr,
    CP1: tl.constexpr,
    BK0: tl.constexpr,
    BK1: tl.constexpr,
    BITS0: tl.constexpr,
    BITS1: tl.constexpr,
    HALVES0: tl.constexpr,
    HALVES1: tl.constexpr,
    RULE: tl.constexpr,
    MODE: tl.constexpr,
    VALUES: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    ORDER: tl.constexpr,
    STAGES: tl.constexpr,
    AFTER: tl.constexpr,
):
    """Encode `per` pages, from per * axis 0 on, of one (batch, KV head) (axis 1).

    x: [B, heads, T, D] 16-bit or float32 with strides stride_b, stride_h, stride_t, channels contiguous;
    mean, weight and order: [B * Hkv, D], if MEAN, WEIGHT and ORDER. For each channel group, of which the
    second has C1 = 0 where there is none: matrix [HALVES, CP, CP], the rotation; table and cells: of
    `plain_fields` at 8 bits; words [B, Hkv, P, bytes / 4] int32 and scale [B, Hkv, P, 128], written; factor:
    value of one unit of the matrix; BOOK, ASM, SQUARES, UNIT: of `encode_page`; C channels, CP padded, BK of
    them in one product.

    largest: of the scale's dtype; RULE: 0 "norm", 1 "norm_corrected", 2 "unbiased"; MODE: RAW, QUICK or
    CAREFUL; STAGES: of the loop over pages. flag [1] becomes 1 where a vector is not finite, 2 where one is
    out of the range of a MODE other than CAREFUL. With AFTER, nothing is done unless after [1], the flag of
    another launch, is 2.
    """
    if AFTER:
        pages = tl.where(tl.load(after_ptr) == 2, pages, 0)
    head = tl.program_id(1).to(tl.int64)
    x_ptr += head // heads * stride_b + head % heads * stride_h
    mean_ptr += head * (C0 + C1)
    weight_ptr += head * (C0 + C1)
    order_ptr += head * (C0 + C1)
    high0 = held(matrix0_ptr, 0, HALVES0, BK0, CP0)
    low0 = held(matrix0_ptr, 1, HALVES0, BK0, CP0)
    if C1 > 0:
        high1 = held(matrix1_ptr, 0, HALVES1, BK1, CP1)
        low1 = held(matrix1_ptr, 1, HALVES1, BK1, CP1)
    first = tl.program_id(0) * per
    for page in tl.range(first, tl.minimum(first + per, pages), num_stages=STAGES):
        at = head * pages + page
        vectors_ptr = x_ptr + (at - head * pages) * (128 * stride_t)
        encode_page(
            vectors_ptr,
            stride_t,
            mean_ptr,
            weight_ptr,
            order_ptr,
            matrix0_ptr,
            high0,
            low0,
            table0_ptr,
            cells0,
            words0_ptr + at * (4 * BITS0 * C0),
            scale0_ptr + at * 128,
            flag_ptr,
            largest,
            factor0,
            BOOK0,
            ASM0,
            SQUARES0,
            UNIT0,
            0,
            C0,
            CP0,
            BK0,
            BITS0,
            HALVES0,
            RULE,
            MODE,
            VALUES,
            MEAN,
            WEIGHT,
            ORDER,
        )
        if C1 > 0:
            encode_page(
                vectors_ptr,
                stride_t,
                mean_ptr,
                weight_ptr,
                order_ptr,
                matrix1_ptr,
                high1,
                low1,
                table1_ptr,
                cells1,
                words1_ptr + at * (4 * BITS1 * C1),
                scale1_ptr + at * 128,
                flag_ptr,
                largest,
                factor1,
                BOOK1,
                ASM1,
                SQUARES1,
                UNIT1,
                C0,
                C1,
                CP1,
                BK1,
                BITS1,
                HALVES1,
                RULE,
                MODE,
                VALUES,
                MEAN,
                WEIGHT,
                ORDER,
            )
