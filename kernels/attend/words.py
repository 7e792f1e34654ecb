"""Packed words from memory to operands of int8 tensor cores (Gluon; see `split_mma`).

Each lane loads the words that it needs itself, 16 bytes at a time, and looks their codes up, so nothing is
exchanged between threads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from quantpress.kernels.attend.lookup import (
    BYTES,
    LOOKUP_2,
    LOOKUP_3,
    LOOKUP_3_HALF,
    LOOKUP_4,
    SIGNS,
    SIGNS_HALF,
)
from quantpress.kernels.gluon_names import async_load

READ_ONCE = gl.constexpr("evict_first")
"""Codes leave the L2 cache first: nearly all are read once, and push out nothing that is read again."""


@gluon.constexpr_function
def bytes_layout(VECTORS):
    """The layout [VECTORS, 32 lanes, 4 words, 4 bytes] in which each lane holds its own words."""
    return gl.BlockedLayout([VECTORS, 1, 4, 4], [1, 32, 1, 1], [1, 1, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def operand_channels(C):
    """C channels as operands have them: 64, 128 or 256. What keys have beyond C meets queries of 0."""
    return max(64, 1 << (C - 1).bit_length())


@gluon.constexpr_function
def row_words(C):
    """Words from row to row of packed keys of C channels: blocks of 64 channels lie one after the other."""
    return 16 if C % 64 == 0 else C // 4


@gluon.jit
def key_offsets(GAP: gl.constexpr, VECTORS: gl.constexpr, C: gl.constexpr, ROWS: gl.constexpr, live=1):
    """Offsets in words of 16 or 32 rows of packed keys: [VECTORS, 32, 4].

    GAP: rows from one group of 16 rows to the next; C: channels, beyond which the last ones are read again;
    ROWS: rows R of a part of the page; live: 1, or 0 for one vector of 16 bytes that all lanes load.
    """
    layout: gl.constexpr = gl.SliceLayout(3, bytes_layout(VECTORS))
    vector = gl.arange(0, VECTORS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    blocks: gl.constexpr = operand_channels(C) // 64
    row = vector // blocks % 2 * 2 + vector // (2 * blocks) * GAP
    if C % 64 == 0:
        own = ((lane // 4 % 2 + lane // 8 * 4) * 16 + lane % 4 * 4) * live
        column = vector % blocks
        if blocks * 64 > C:
            column = gl.minimum(column, C // 64 - 1)
        at = row * 16 + column * (16 * ROWS)
        at = at[:, None, None] + own[None, :, None] + word[None, None, :]
    else:
        own = (lane // 4 % 2 + lane // 8 * 4) * (row_words(C) * live)
        column = (vector % blocks * 16)[:, None] + (lane % 4 * 4)[None, :]
        column = gl.minimum(column, C // 4 - 4) * live
        at = (row * row_words(C))[:, None, None] + own[None, :, None]
        at = at + column[:, :, None] + word[None, None, :]
    return at


@gluon.jit
def value_offsets(GAP: gl.constexpr, VECTORS: gl.constexpr, C: gl.constexpr):
    """Offsets in words of 4 or 8 rows of packed values: [VECTORS, 32, 4]; groups of 4 are GAP rows apart."""
    layout: gl.constexpr = gl.SliceLayout(3, bytes_layout(VECTORS))
    vector = gl.arange(0, VECTORS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    columns: gl.constexpr = operand_channels(C) // 32
    if columns * 32 == C:
        at = vector // columns * (GAP * C) + vector % columns * 32
        own = lane % 4 * C + lane // 4 * 4
        at = at[:, None, None] + own[None, :, None] + word[None, None, :]
    else:
        at = (vector // columns * (GAP * C))[:, None] + (lane % 4 * C)[None, :]
        column = (vector % columns * 32)[:, None] + (lane // 4 * 4)[None, :]
        at = (at + gl.minimum(column, C - 4))[:, :, None] + word[None, None, :]
    return at


@gluon.jit
def _load(ptr, offsets):
    return gl.load(ptr + offsets, eviction_policy=READ_ONCE)


@gluon.jit
def words_buffer(WORDS: gl.constexpr, PARTS: gl.constexpr, STAGED: gl.constexpr):
    """Shared memory for three planes of WORDS words of a page, or PARTS; next to none if not STAGED."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    shape: gl.constexpr = [max(PARTS, 3), WORDS // 128, 32, 4] if STAGED else [3, 1, 1, 4]
    return gl.allocate_shared_memory(gl.int32, shape, plain)


@gluon.jit
def fetch_words(buffer, ptr, offsets, step, PART: gl.constexpr, PARTS: gl.constexpr, HALVES: gl.constexpr):
    """Copy a page of PARTS planes of words to shared memory before its first step; nothing before its second.

    buffer: of `words_buffer`; ptr: the page; offsets: of the lane's words in each plane; PART: words of a
    plane. Each lane copies the words that it reads itself. There is no L2::evict_first: `cp.async` has none
    in Triton.
    """
    if HALVES == 1 or step % 2 == 0:
        for part in gl.static_range(PARTS):
            async_load(buffer.index(part), ptr + part * PART + offsets)
    async_copy.commit_group()


@gluon.jit
def fetched_words(buffer, VECTORS: gl.constexpr, PARTS: gl.constexpr):
    """The words of PARTS planes in shared memory: four tensors, as `key_words` returns them."""
    layout: gl.constexpr = gl.SliceLayout(3, bytes_layout(VECTORS))
    c = buffer.index(2).load(layout)
    d = c
    if PARTS > 3:
        d = buffer.index(3).load(layout)
    return buffer.index(0).load(layout), buffer.index(1).load(layout), c, d


@gluon.jit
def key_words(
    ptr, step, C: gl.constexpr, BITS: gl.constexpr, SIGNS: gl.constexpr, HALVES: gl.constexpr, live=1
):
    """Words of the keys of a page, or of one half of it: four tensors, some of which may be needed.

    ptr: the page; step: odd for the second half, if HALVES is 2; C: channels; SIGNS: the page has BITS bit
    planes; live: 0 where the words are not needed, see `key_offsets`.
    """
    D: gl.constexpr = operand_channels(C)
    ROW: gl.constexpr = row_words(C)
    half = step % 2 * (16 * ROW)
    if BITS == 3 or SIGNS:  # both halves lie in each word
        a = _load(ptr, key_offsets(0, D // 32, C, 16, live))
        b, c = a, a
        if BITS > 1:
            b = _load(ptr + 4 * C, key_offsets(0, D // 32, C, 16, live))
        if BITS > 2:
            c = _load(ptr + 8 * C, key_offsets(0, D // 32, C, 16, live))
        d = c
        if BITS > 3:
            d = _load(ptr + 12 * C, key_offsets(0, D // 32, C, 16, live))
    elif BITS == 8:
        a = _load(ptr + half, key_offsets(32, D // 16, C, 128, live))
        b = _load(ptr + half + 64 * ROW, key_offsets(32, D // 16, C, 128, live))
        c, d = a, a
    elif HALVES == 2:
        if BITS == 4:
            a = _load(ptr + half, key_offsets(32, D // 16, C, 64, live))
        else:
            a = _load(ptr + half, key_offsets(0, D // 32, C, 32, live))
        b, c, d = a, a, a
    elif BITS == 4:
        a = _load(ptr, key_offsets(16, D // 16, C, 64, live))
        b = _load(ptr + 32 * ROW, key_offsets(16, D // 16, C, 64, live))
        c, d = a, a
    else:
        a = _load(ptr, key_offsets(16, D // 16, C, 32, live))
        b, c, d = a, a, a
    return a, b, c, d


@gluon.jit
def value_words(ptr, step, C: gl.constexpr, BITS: gl.constexpr, SIGNS: gl.constexpr, HALVES: gl.constexpr):
    """Words of the values of a page, as `key_words` returns those of keys."""
    D: gl.constexpr = operand_channels(C)
    half = step % 2 * (4 * C)
    if BITS == 3 or SIGNS:
        a = _load(ptr, value_offsets(0, D // 32, C))
        b, c = a, a
        if BITS > 1:
            b = _load(ptr + 4 * C, value_offsets(0, D // 32, C))
        if BITS > 2:
            c = _load(ptr + 8 * C, value_offsets(0, D // 32, C))
        d = c
        if BITS > 3:
            d = _load(ptr + 12 * C, value_offsets(0, D // 32, C))
    elif BITS == 8:
        a = _load(ptr + half, value_offsets(8, D // 16, C))
        b = _load(ptr + half + 16 * C, value_offsets(8, D // 16, C))
        c, d = a, a
    elif HALVES == 2:
        if BITS == 4:
            a = _load(ptr + half, value_offsets(8, D // 16, C))
        else:
            a = _load(ptr + half, value_offsets(0, D // 32, C))
        b, c, d = a, a, a
    elif BITS == 4:
        a = _load(ptr, value_offsets(4, D // 16, C))
        b = _load(ptr + 8 * C, value_offsets(4, D // 16, C))
        c, d = a, a
    else:
        a = _load(ptr, value_offsets(4, D // 16, C))
        b, c, d = a, a, a
    return a, b, c, d


@gluon.jit
def _repeat(words, VECTORS: gl.constexpr):
    """[VECTORS, 32, 4] -> [VECTORS, 32, 4, 4]: each word four times, once for each byte that comes of it."""
    return words[:, :, :, None] + gl.full([VECTORS, 32, 4, 4], 0, gl.int32, bytes_layout(VECTORS))


@gluon.jit
def _register(tables, ROW: gl.constexpr, VECTORS: gl.constexpr):
    """Row ROW of the lookup table, from shared memory."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, bytes_layout(VECTORS))))
    return tables.index(ROW).load(layout)[None, :][:, :, None][:, :, :, None]


@gluon.jit
def _pair(a, b, VECTORS: gl.constexpr):
    """Two groups of 16 tokens as one tile."""
    return gl.join(a, b).permute([4, 0, 1, 2, 3]).reshape([2 * VECTORS, 32, 4, 4])


@gluon.jit
def levels_of(
    a, b, c, step, tables, SIDE: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, HALVES: gl.constexpr
):
    """int8 levels of four tiles [D / 16, 32, 4, 4]; of half a page two tiles, each returned twice.

    a, b, c: words, of `key_words` or `value_words`; step: odd for the second half, if HALVES is 2; tables:
    the lookup table in shared memory; SIDE: 0 for keys, 1 for values; D: channels.
    """
    N: gl.constexpr = D // 16 if BITS >= 4 or (BITS == 2 and HALVES == 1) else D // 32
    low = _register(tables, 2 * SIDE, N)
    if BITS == 3 or BITS == 4:
        high = _register(tables, 2 * SIDE + 1, N)
    if BITS == 8:
        w, x = gl.inline_asm_elementwise(
            BYTES,
            "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), _repeat(b, N), low],
            dtype=(gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        y, z = w, x
    elif BITS == 4:
        w, x = gl.inline_asm_elementwise(
            LOOKUP_4,
            "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), low, high],
            dtype=(gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        if HALVES == 2:
            y, z = w, x
        else:
            y = x
            x, z = gl.inline_asm_elementwise(
                LOOKUP_4,
                "=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r",
                [_repeat(b, N), low, high],
                dtype=(gl.int8, gl.int8),
                is_pure=True,
                pack=4,
            )
    elif BITS == 3 and HALVES == 2:
        w0, w1, x0, x1 = gl.inline_asm_elementwise(
            LOOKUP_3_HALF,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), _repeat(b, N), _repeat(c, N), low, high, step % 2 * 16],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        w, x = _pair(w0, w1, N), _pair(x0, x1, N)
        y, z = w, x
    elif BITS == 3:
        w0, w1, x0, x1, y0, y1, z0, z1 = gl.inline_asm_elementwise(
            LOOKUP_3,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), _repeat(b, N), _repeat(c, N), low, high],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        w, x, y, z = _pair(w0, w1, N), _pair(x0, x1, N), _pair(y0, y1, N), _pair(z0, z1, N)
    else:
        w, x, y, z = gl.inline_asm_elementwise(
            LOOKUP_2,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [_repeat(a, N), low],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        if HALVES == 2:
            w = _pair(w, x, N)
            x = _pair(y, z, N)
            y, z = w, x
    return w, x, y, z


@gluon.jit
def signs_of(words, step, D: gl.constexpr, HALVES: gl.constexpr):
    """int8 tiles of a bit plane as `levels_of` returns them: -1 where a bit of its words is set, else 0."""
    N: gl.constexpr = D // 32
    if HALVES == 2:
        w0, w1, x0, x1 = gl.inline_asm_elementwise(
            SIGNS_HALF,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [_repeat(words, N), step % 2],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        w, x = _pair(w0, w1, N), _pair(x0, x1, N)
        y, z = w, x
    else:
        w0, w1, x0, x1, y0, y1, z0, z1 = gl.inline_asm_elementwise(
            SIGNS,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r",
            [_repeat(words, N)],
            dtype=(gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8, gl.int8),
            is_pure=True,
            pack=4,
        )
        w, x, y, z = _pair(w0, w1, N), _pair(x0, x1, N), _pair(y0, y1, N), _pair(z0, z1, N)
    return w, x, y, z


@gluon.jit
def key_operand(levels, D: gl.constexpr, mma: gl.constexpr):
    """[D / 16, 32, 4, 4] int8 -> [32, D], the left operand of the scores."""
    x = levels.reshape([2, 2, D // 64, 4, 2, 4, 2, 2, 4])  # x b v | n e t | u h i
    x = x.permute([0, 1, 3, 4, 2, 6, 7, 5, 8]).reshape([32, D])
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)


@gluon.jit
def value_operand(levels, C: gl.constexpr, mma: gl.constexpr):
    """[C / 16, 32, 4, 4] int8 -> [C, 32], the left operand of the sum."""
    x = levels.reshape([2, C // 32, 8, 4, 4, 4])  # h c | g t | u i
    x = x.permute([1, 4, 2, 0, 3, 5]).reshape([C, 32])
    return gl.convert_layout(x, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)
