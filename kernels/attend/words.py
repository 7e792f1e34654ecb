"""Packed words from memory to the threads that look their codes up (Gluon; see `split_mma`).

Each lane loads the words that it needs itself, 16 bytes at a time, so nothing is exchanged.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

READ_ONCE = gl.constexpr("evict_first")
"""Codes leave the L2 cache first: nearly all are read once, and push out nothing that is read again."""


@gluon.constexpr_function
def bytes_layout(VECTORS):
    """[VECTORS, 32 lanes, 4 words, 4 bytes]: each lane holds its own words."""
    return gl.BlockedLayout([VECTORS, 1, 4, 4], [1, 32, 1, 1], [1, 1, 1, 1], [3, 2, 1, 0])


@gluon.jit
def key_places(GAP: gl.constexpr, VECTORS: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr):
    """Where 16 or 32 rows of packed keys lie: [VECTORS, 32, 4]; groups of 16 rows are GAP rows apart."""
    layout: gl.constexpr = gl.SliceLayout(3, bytes_layout(VECTORS))
    vector = gl.arange(0, VECTORS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    blocks: gl.constexpr = D // 64
    row = vector // blocks % 2 * 2 + vector // (2 * blocks) * GAP
    own = (lane // 4 % 2 + lane // 8 * 4) * 16 + lane % 4 * 4
    at = row * 16 + vector % blocks * (16 * ROWS)
    return at[:, None, None] + own[None, :, None] + word[None, None, :]


@gluon.jit
def value_places(GAP: gl.constexpr, VECTORS: gl.constexpr, C: gl.constexpr):
    """Where 4 or 8 rows of packed values lie: [VECTORS, 32, 4]; groups of 4 rows are GAP rows apart."""
    layout: gl.constexpr = gl.SliceLayout(3, bytes_layout(VECTORS))
    vector = gl.arange(0, VECTORS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    columns: gl.constexpr = C // 32
    at = vector // columns * (GAP * C) + vector % columns * 32
    own = lane % 4 * C + lane // 4 * 4
    return at[:, None, None] + own[None, :, None] + word[None, None, :]


@gluon.jit
def _load(ptr, places):
    return gl.load(ptr + places, eviction_policy=READ_ONCE)


@gluon.jit
def room_for_words(WORDS: gl.constexpr, STAGED: gl.constexpr):
    """Shared memory for the words of a page of 3 bits, three times WORDS; hardly any if not STAGED."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    shape: gl.constexpr = [3, WORDS // 128, 32, 4] if STAGED else [3, 1, 1, 4]
    return gl.allocate_shared_memory(gl.int32, shape, plain)


@gluon.jit
def fetch_words(room, ptr, places, step, PART: gl.constexpr):
    """The words of a page of 3 bits to shared memory, before its first step; nothing before its second.

    A lane copies the words that it reads itself. No L2::evict_first: `cp.async` has none in Triton.
    """
    if step % 2 == 0:
        for part in gl.static_range(3):
            async_copy.async_copy_global_to_shared(room.index(part), ptr + part * PART + places)
    async_copy.commit_group()


@gluon.jit
def fetched_words(room, VECTORS: gl.constexpr):
    """The words out of shared memory: three tensors as `key_words` has them."""
    layout: gl.constexpr = gl.SliceLayout(3, bytes_layout(VECTORS))
    return room.index(0).load(layout), room.index(1).load(layout), room.index(2).load(layout)


@gluon.jit
def key_words(ptr, step, D: gl.constexpr, BITS: gl.constexpr, HALVES: gl.constexpr):
    """The words of keys of a page, or of one half of it: three tensors, not all of them used."""
    half = step % 2 * (16 * 16)
    if BITS == 3:  # both halves lie in each word
        a = _load(ptr, key_places(0, D // 32, D, 16))
        b = _load(ptr + 4 * D, key_places(0, D // 32, D, 16))
        c = _load(ptr + 8 * D, key_places(0, D // 32, D, 16))
    elif HALVES == 2:
        if BITS == 4:
            a = _load(ptr + half, key_places(32, D // 16, D, 64))
        else:
            a = _load(ptr + half, key_places(0, D // 32, D, 32))
        b, c = a, a
    elif BITS == 4:
        a = _load(ptr, key_places(16, D // 16, D, 64))
        b = _load(ptr + 32 * 16, key_places(16, D // 16, D, 64))
        c = a
    else:
        a = _load(ptr, key_places(16, D // 16, D, 32))
        b, c = a, a
    return a, b, c


@gluon.jit
def value_words(ptr, step, C: gl.constexpr, BITS: gl.constexpr, HALVES: gl.constexpr):
    """The same of values."""
    half = step % 2 * (4 * C)
    if BITS == 3:
        a = _load(ptr, value_places(0, C // 32, C))
        b = _load(ptr + 4 * C, value_places(0, C // 32, C))
        c = _load(ptr + 8 * C, value_places(0, C // 32, C))
    elif HALVES == 2:
        if BITS == 4:
            a = _load(ptr + half, value_places(8, C // 16, C))
        else:
            a = _load(ptr + half, value_places(0, C // 32, C))
        b, c = a, a
    elif BITS == 4:
        a = _load(ptr, value_places(4, C // 16, C))
        b = _load(ptr + 8 * C, value_places(4, C // 16, C))
        c = a
    else:
        a = _load(ptr, value_places(4, C // 16, C))
        b, c = a, a
    return a, b, c
