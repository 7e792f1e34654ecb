"""Attention straight from packed codes, on int8 tensor cores (Gluon), for NVIDIA GPUs from Ampere on.

One program is one warp; it reads the packed tokens of one split of one KV head, a page at a time, and keeps
everything in registers but words of 3 bits at a head_dim of 256, of three and four bit planes, and of 3 bits
and bit planes beside codes of 8 bits. For token t and row r (a query head of the group and a query token), in
units of log 2, with b the signed bytes of a codebook's odd levels:

    s[t, r] = k_scale[t] factor[r] sum_c (2 b[t, c] + 1) q[c, r],    p[t, r] = exp2(s[t, r] - m[r])
    o[r] += sum_t p[t, r] v_scale[t] (2 b[t, :] + 1),                l[r] += sum_t p[t, r]

Queries (by `prepare_kernel`, or here by `opening.queries`) and weights p * v_scale (here, relative to the
largest of the page) are whole numbers of 16 bits, split into a high and a low byte: columns 2 r and 2 r + 1
of one `mma.m16n8k32`, which one thread holds and adds up. A product has room for four rows. Products of bytes
are exact, so the only loss is 2 ** -16 of the largest query coordinate, or weight.

Over bit planes (K_SIGNS, V_SIGNS) a byte is 0 or -1, and a vector has a level for each plane: the scores are
a sum over planes, each with queries of its own, and every plane of the values has its own sum o. Levels that
are not whole (K_FINE, V_FINE) have a second byte, which counts a 256th, and a second product.

Channels in two groups (K2_BITS, V2_BITS) have codes and a scale of each group: the scores are a sum over
both, and each group of the values has a sum o of its own, of half of the channels.

A packed word goes from memory to the tensor core without leaving its thread (`words`): `prmt` makes bytes of
its codes (`lookup`), and the rows and columns of the products are numbered so that each thread loads 16 bytes
at a time. Both are left operands. A tile is 32 tokens, two groups x of 16:

    K operand    thread 4 * g + t, row 8 * b + g of group x: token 16 * x + 4 * (g // 2) + 2 * b + g % 2,
                 column 64 * v + 32 * u + 16 * h + 4 * t + i: channel 64 * v + 16 * t + 8 * u + 4 * h + i
    V operand    row 32 * c + 8 * u + g: channel 32 * c + 4 * g + u, column 16 * h + 4 * t + i: token
                 16 * x[h] + 4 * t + i

Thread 4 * g + t then holds the scores of row t, and of rows t + 4, t + 8, t + 12 where there are more. The
weights of a row go to the two columns of their bytes by `movmatrix` (`tiles.weight_operand`).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from quantpress.kernels.attend.opening.queries import (
    load_biases,
    load_channels,
    load_channels_of,
    load_rows,
    load_rows_of,
    numbers_of_parts,
    numbers_of_rows,
    query_operand,
    query_operands,
    turned_groups,
    turned_queries,
)
from quantpress.kernels.attend.opening.tokens import attend_tokens
from quantpress.kernels.attend.page_step import (
    FINE,
    PAGE_TOKENS,
    in_this_order,
    page_at,
    page_step,
    row_of_page,
)
from quantpress.kernels.attend.tiles import (
    high_and_low,
    of_rows,
    sums_of_lanes,
)
from quantpress.kernels.attend.words import (
    fetch_words,
    key_offsets,
    key_words,
    operand_channels,
    words_buffer,
)


@gluon.jit
def _wait():
    """Wait for the kernel before this one (Hopper and later)."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _start_next():
    """Let the next kernel start (Hopper and later)."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0",
        "=r,~{memory}",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _in_lanes(x):
    """x, for the assembler a number of each lane from here on: it cannot know that a lane's mask has one bit.

    With numbers that all lanes share, and so with most addresses, it computes in registers of the whole warp.
    There they take longer, and it fills the time before the loads with what was to follow them.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b32 one; mov.b32 one, %lanemask_eq; popc.b32 one, one; sub.s32 one, one, 1; "
        "add.s32 $0, $1, one; }",
        "=r,r",
        [x],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _behind(x, unity):
    """x of `load_rows` or `load_channels`, but what is computed from it stays behind the last `_order`.

    unity: 1 in shared memory, which is read here. Without it the assembler puts all loads of codes behind the
    last sum of `turned_queries`.
    """
    if len(x.shape) == 2:
        x = x * unity.load(gl.SliceLayout(1, x.type.layout))[:, None]
    else:
        x = x * unity.load(x.type.layout)
    return x


@gluon.jit
def _load_tables(lookup_ptr, FINE: gl.constexpr):
    """Rows of the lookup table, [32] each: four, and four more if FINE."""
    row = lookup_ptr + gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    a, b, c, d = gl.load(row), gl.load(row + 32), gl.load(row + 64), gl.load(row + 96)
    e, f, g, h = a, b, c, d
    if FINE:
        e, f, g, h = gl.load(row + 128), gl.load(row + 160), gl.load(row + 192), gl.load(row + 224)
    return a, b, c, d, e, f, g, h


@gluon.jit
def _store_tables(tables, rows, FINE: gl.constexpr):
    """Rows of `_load_tables` to shared memory."""
    for index in gl.static_range(8 if FINE else 4):
        tables.index(index).store(rows[index])


@gluon.constexpr_function
def _heads_layout(HEADS):
    return gl.BlockedLayout([max(HEADS // 32, 1)], [32], [1], [0])


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _assigned(
    used_ptr, starts_ptr, heads, pages, program, programs, HEADS: gl.constexpr, STARTS: gl.constexpr
):
    """With a page table: the head of a program, its first page, and one past its last; equal if it has none.

    used_ptr, starts_ptr, heads, pages, HEADS and STARTS are those of `split_mma_kernel`. Programs are divided
    as by `chunks_of_heads` of `schedule_kernel`. The quotient is exact for less than 2 ** 21 pages per head;
    16 integer divisions would take 0.3 us.
    """
    lanes: gl.constexpr = _heads_layout(HEADS)
    head = gl.arange(0, HEADS, layout=lanes)
    used = gl.load(used_ptr + head, mask=head < heads, other=0)
    start = 0 * used
    if STARTS:
        start = gl.load(starts_ptr + head, mask=head < heads, other=0)
    end = gl.minimum(start + used, pages * PAGE_TOKENS)
    begin = start // PAGE_TOKENS
    there = gl.where(used > 0, (end + PAGE_TOKENS - 1) // PAGE_TOKENS - begin, 0)
    spare = programs - heads
    size = gl.maximum((gl.sum(there, 0) + spare - 1) // spare, 1)
    chunks = ((there + size).to(gl.float32) - 0.5) * (1.0 / size.to(gl.float32))
    chunks = chunks.to(gl.int32)
    ends = gl.associative_scan(chunks, 0, _add)
    own = (ends - chunks <= program) & (program < ends)
    mine = gl.sum(gl.where(own, head, 0), 0)
    local = program - gl.sum(gl.where(own, ends - chunks, 0), 0)
    parts = gl.maximum(gl.sum(gl.where(own, chunks, 0), 0), 1)  # there may be more programs than chunks
    held = gl.sum(gl.where(own, there, 0), 0)
    skipped = gl.sum(gl.where(own, begin, 0), 0)
    return mine, skipped + local * held // parts, skipped + (local + 1) * held // parts


@gluon.jit
def _in_order(x, R: gl.constexpr, DV: gl.constexpr, layout: gl.constexpr):
    """Sums [DV, R] as [R, DV] with the channels of `value_operand` in their order, in another layout."""
    x = x.reshape([DV // 32, 4, 8, R]).permute([3, 0, 2, 1]).reshape([R, DV])  # c u g r -> r c g u
    return gl.convert_layout(x, layout)


_VARYING = [
    "pages",
    "heads",
    "blocks",
    "page_table_row",
    "rows",
    "queries",
    "kv_heads",
    "first_tokens",
    "recent_tokens",
    "parts",
    "beside",
    "slots",
    "hidden",
    "first_table_row",
    "recent_table_row",
]


@gluon.jit(do_not_specialize=_VARYING)
def split_mma_kernel(
    lookup_ptr,
    q_ptr,
    factor_ptr,
    start_ptr,
    bias_ptr,
    page_scores_ptr,
    k_ptr,
    ks_ptr,
    v_ptr,
    vs_ptr,
    k2_ptr,
    k2s_ptr,
    v2_ptr,
    v2s_ptr,
    used_ptr,
    starts_ptr,
    page_table_ptr,
    schedule_ptr,
    order_ptr,
    query_ptr,
    weight_ptr,
    mean_ptr,
    signs_ptr,
    first_k_ptr,
    first_v_ptr,
    recent_k_ptr,
    recent_v_ptr,
    first_used_ptr,
    recent_used_ptr,
    first_starts_ptr,
    recent_starts_ptr,
    first_table_ptr,
    recent_table_ptr,
    slots_ptr,
    dense_o_ptr,
    dense_m_ptr,
    dense_l_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    pages,
    heads,
    blocks,
    page_table_row,
    k_head,
    k_page,
    ks_head,
    ks_page,
    v_head,
    v_page,
    vs_head,
    vs_page,
    k2_head,
    k2_page,
    k2s_head,
    k2s_page,
    v2_head,
    v2_page,
    v2s_head,
    v2s_page,
    rows,
    softcap,
    scale,
    unit,
    queries,
    kv_heads,
    first_tokens,
    recent_tokens,
    parts,
    beside,
    slots,
    hidden,
    first_table_row,
    recent_table_row,
    first_k_page,
    first_k_head,
    first_v_page,
    first_v_head,
    recent_k_page,
    recent_k_head,
    recent_v_page,
    recent_v_head,
    D: gl.constexpr,
    DV: gl.constexpr,
    R: gl.constexpr,
    ROWS: gl.constexpr,
    K_BITS: gl.constexpr,
    V_BITS: gl.constexpr,
    K_SIGNS: gl.constexpr,
    V_SIGNS: gl.constexpr,
    K_FINE: gl.constexpr,
    V_FINE: gl.constexpr,
    K2_BITS: gl.constexpr,
    V2_BITS: gl.constexpr,
    SKETCH: gl.constexpr,
    HALVES: gl.constexpr,
    USED: gl.constexpr,
    STARTS: gl.constexpr,
    HEADS: gl.constexpr,
    SCHEDULED: gl.constexpr,
    CAPPED: gl.constexpr,
    PAGE_KEYS: gl.constexpr,
    STAGED: gl.constexpr,
    CHAINED: gl.constexpr,
    AHEAD: gl.constexpr,
    IN_LANES: gl.constexpr,
    OPENS: gl.constexpr,
    TILE: gl.constexpr,
    HAS_WEIGHT: gl.constexpr,
    HAS_MEAN: gl.constexpr,
    FIRST_USED: gl.constexpr,
    RECENT_USED: gl.constexpr,
    FIRST_STARTS: gl.constexpr,
    RECENT_STARTS: gl.constexpr,
    FIRST_PAGE: gl.constexpr,
    RECENT_PAGE: gl.constexpr,
    SHARED: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Partial softmax sums of one split (axis 0) of one (batch, KV head, block of R rows) (axis 1).

    lookup: [4, 32] int32, of `lookup_table`; q: [N, 2R, D] int8, factor and bias: [N, R] float32, start: [N,
    2R] int32, all of `prepare_kernel` unless OPENS, N = heads * blocks; k, v: pages of words, int32, and ks,
    vs: their scales in any float dtype, with the strides *_head and *_page, those of k and v in words; pages:
    P; used: [heads] int32, tokens in use, if USED; starts: [heads] int32, the first of them, if STARTS; rows:
    of a head; softcap: in units of log 2, if CAPPED; page_scores: [N, P, 2, R] float32, of
    `page_scores_kernel`, if PAGE_KEYS. Written: o [A, S, R, DV], only rows of the head, m and l [A, R, S]
    float32, with S and A programs on the axes.

    Where HEADS, a power of two of at least `heads`, is not 0, heads have page tables: page p of a head is row
    page_table[head, p] of a pool, page_table [heads, page_table_row] int32; axis 0 is divided among the heads
    by the pages that each has in use, and axis 1 counts blocks of rows of a head. If SCHEDULED, schedule [S,
    4] int32 of `PageSchedule` says how, and HEADS need only not be 0.

    D and DV are what pages have; where these are not 64, 128 or 256, q and o have `operand_channels`.

    K_SIGNS, V_SIGNS: keys, or values, are bit planes, K_BITS or V_BITS of them, of `SignOperands`. Then q is
    [N, K_BITS, 2R, D], and o [A, S, R, V_BITS, DV], a sum for each plane.

    K_FINE, V_FINE: a level of keys, or of values, is one byte and another one of a 256th; lookup is [8, 32].

    K2_BITS, V2_BITS: not 0 where the second half of the channels of keys, or of values, is a group of its
    own, with codes of so many bits, k2 or v2, and scales, k2s or v2s; K_BITS, V_BITS are those of the first
    half. 1 bit is a bit plane. lookup is [8, 32], and OPENS. If K2_BITS, order is that of the keys'
    transform, [BH, D] int16, and signs are the first rows of both rotations one after the other, times the
    units of levels. o has the sums of both groups of values side by side. SKETCH: k2 are bits of a sketch of
    all D channels. q [BH, rows, 2 D] float32 and bias [BH, rows] are then those of `turn_queries_kernel`,
    which knows of weights, means and rotations.

    ROWS: rows that are computed, R, or 4 where no head has more.

    HALVES is 2 to take a page in two steps, groups of tokens 0, 2, 4, 6 before 1, 3, 5, 7. STAGED: words of 3
    bits, or of bit planes, are read from shared memory. CHAINED: the next kernel may start before this one
    has ended, and this one was started before the one in front has, which is `prepare_kernel` unless OPENS.

    OPENS: queries are prepared here as by `prepare_kernel`, which has the arguments from query to slots, from
    scale to kv_heads and from hidden on; signs: [D] float32, row 0 of the rotation, a Walsh-Hadamard matrix
    with signed columns. The 16-bit tokens are attended here too, TILE at a time: `parts` programs of each
    block of rows write the first of the `slots` sums in dense_o, dense_m and dense_l. The first
    `beside` programs on axis 0, of all heads where HEADS, attend nothing else. AHEAD, only with OPENS: what
    needs no memory that a kernel before this one may write stands in front of the wait. Tables and signs are
    among it, as they are made on the host. IN_LANES, without AHEAD: whether the head's number (1), and that
    of the program within its head (2, with OPENS), are `_in_lanes`, and so all that is computed from them.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    MORE_LEVELS: gl.constexpr = K_FINE or V_FINE or K2_BITS > 0 or V2_BITS > 0
    split = gl.program_id(0)
    splits = gl.num_programs(0)
    if AHEAD:
        row_block = gl.program_id(1) % blocks
        own_head = (gl.program_id(1) // blocks).to(gl.int64)
        own_split, own_splits = split - beside, splits - beside
        own_count = (pages - own_split + own_splits - 1) // own_splits
        rows_of_tables = _load_tables(lookup_ptr, MORE_LEVELS)
        signs = load_channels(signs_ptr, ROWS, D)
    if OPENS and CHAINED:
        _wait()
    if not AHEAD:
        row_block = gl.program_id(1) % blocks
        own_head = gl.program_id(1) // blocks
        own_split, own_splits = split - beside, splits - beside
        own_count = 0
        if IN_LANES > 0:
            own_head = _in_lanes(own_head)
        if IN_LANES > 1:
            own_split = _in_lanes(own_split)
        own_head = own_head.to(gl.int64)
    if OPENS:
        if HEADS:
            dense_head = (split // gl.maximum(parts, 1)).to(gl.int64)
            dense_block = dense_head * blocks + gl.program_id(1)
            part, attends = split % gl.maximum(parts, 1), split < beside
        else:
            dense_block = gl.program_id(1).to(gl.int64)
            dense_head = own_head
            part, attends = split, split < parts
        if attends:
            dense_own = dense_head
            if SLOTS:
                dense_own = gl.load(slots_ptr + dense_head // kv_heads) * kv_heads + dense_head % kv_heads
            attend_tokens(
                query_ptr,
                first_k_ptr,
                first_v_ptr,
                recent_k_ptr,
                recent_v_ptr,
                first_used_ptr,
                recent_used_ptr,
                first_starts_ptr,
                recent_starts_ptr,
                first_table_ptr,
                recent_table_ptr,
                dense_o_ptr,
                dense_m_ptr,
                dense_l_ptr,
                dense_head,
                dense_block,
                dense_own,
                kv_heads,
                row_block * R,
                part,
                parts,
                slots,
                rows,
                queries,
                first_tokens,
                recent_tokens,
                hidden,
                first_table_row,
                recent_table_row,
                first_k_page,
                first_k_head,
                first_v_page,
                first_v_head,
                recent_k_page,
                recent_k_head,
                recent_v_page,
                recent_v_head,
                scale,
                softcap,
                mma,
                D,
                DV,
                R,
                ROWS,
                TILE,
                FIRST_USED,
                RECENT_USED,
                FIRST_STARTS,
                RECENT_STARTS,
                FIRST_PAGE,
                RECENT_PAGE,
                CAPPED,
            )
        if split < beside:
            return
        split, splits = own_split, own_splits
    slot = gl.program_id(1).to(gl.int64) * splits + split
    if HEADS:
        if SCHEDULED:
            assigned = schedule_ptr + split * 4
            mine, first, last = gl.load(assigned), gl.load(assigned + 1), gl.load(assigned + 2)
        else:
            mine, first, last = _assigned(used_ptr, starts_ptr, heads, pages, split, splits, HEADS, STARTS)
        if first >= last:
            if CHAINED and not OPENS:  # the merge must not start before `prepare_kernel` has ended
                _wait()
                _start_next()
            return
        stride, count = 1, last - first
        head = mine.to(gl.int64)
        block = head * blocks + gl.program_id(1)
        page_table_ptr += head * page_table_row
    else:
        head = own_head
        block = gl.program_id(1).to(gl.int64)
    used = pages * PAGE_TOKENS
    unused = 0
    if USED:
        used = gl.minimum(gl.load(used_ptr + head), used)
    if STARTS:
        unused = gl.load(starts_ptr + head)
        used = gl.minimum(used + unused, pages * PAGE_TOKENS)
    if not HEADS:
        begin = unused // PAGE_TOKENS
        there = (used + PAGE_TOKENS - 1) // PAGE_TOKENS - begin
        first, stride = begin + split, splits  # all programs of a head together read what lies together
        count = own_count
        if USED or STARTS or not AHEAD:
            count = (there - split + splits - 1) // splits
        k_ptr += head * k_head
        v_ptr += head * v_head
        ks_ptr += head * ks_head
        vs_ptr += head * vs_head
        if K2_BITS:
            k2_ptr += head * k2_head
            k2s_ptr += head * k2s_head
        if V2_BITS:
            v2_ptr += head * v2_head
            v2s_ptr += head * v2s_head
    lead, clean = 0, count
    if STARTS:  # pages whose tokens are not all in use come last
        lead = (first * PAGE_TOKENS < unused).to(gl.int32)
        clean = clean - lead
    if USED:
        clean = clean - ((first + (count - 1) * stride + 1) * PAGE_TOKENS > used).to(gl.int32)
    clean = HALVES * gl.maximum(clean, 0)
    # An empty split reads the first page all the same, and throws it away.
    if SCHEDULED:
        pool_row = gl.load(schedule_ptr + split * 4 + 3).to(gl.int64)
    else:
        pool_row = row_of_page(
            page_table_ptr, gl.minimum(page_at(0, first, stride, count, lead, STARTS), pages - 1), HEADS > 0
        )
    K_PLANES: gl.constexpr = K_BITS if K_SIGNS else 1
    V_PLANES: gl.constexpr = V_BITS if V_SIGNS else (2 if V2_BITS else 1)
    KC: gl.constexpr = D // 2 if K2_BITS and not SKETCH else D
    VC: gl.constexpr = DV // 2 if V2_BITS else DV
    KP: gl.constexpr = operand_channels(KC)
    VP: gl.constexpr = operand_channels(VC)
    STAGED_K: gl.constexpr = STAGED and (K_BITS == 3 or K_SIGNS)
    STAGED_V: gl.constexpr = STAGED and (V_BITS == 3 or V_SIGNS)
    key_buffer, value_buffer = words_buffer(4 * KP, K_BITS, STAGED_K), words_buffer(4 * VP, V_BITS, STAGED_V)
    if OPENS:  # in front of the codes, which take longer and keep what is asked for later
        unity = gl.allocate_shared_memory(gl.float32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        unity.store(gl.full([1], 1.0, gl.float32, gl.BlockedLayout([1], [32], [1], [0])))
        own = head
        if SLOTS:
            own = gl.load(slots_ptr + head // kv_heads) * kv_heads + head % kv_heads
        if SHARED:
            own = head % kv_heads
        if SKETCH:
            x = load_rows(q_ptr, head, row_block * R, rows, ROWS, 2 * D)
            own_bias = load_biases(bias_ptr, head, row_block * R, rows, ROWS, 2 * D)
        elif K2_BITS:
            order = load_channels(order_ptr + own * D, ROWS, D)
            x = load_rows_of(query_ptr, order, head, row_block * R, rows, ROWS, D)
        else:
            x = load_rows(query_ptr, head, row_block * R, rows, ROWS, D)
        if not SKETCH:
            if not AHEAD:
                signs = load_channels(signs_ptr, ROWS, D)
            weights, mean = signs, signs
            if HAS_WEIGHT and K2_BITS:
                weights = load_channels_of(weight_ptr + own * D, order)
            elif HAS_WEIGHT:
                weights = load_channels(weight_ptr + own * D, ROWS, D)
            if HAS_MEAN and K2_BITS:
                mean = load_channels_of(mean_ptr + own * D, order)
            elif HAS_MEAN:
                mean = load_channels(mean_ptr + own * D, ROWS, D)
        in_this_order(first)
    if STAGED_K:
        ka, kb, kc, kd = first, first, first, first
        fetch_words(
            key_buffer, k_ptr + pool_row * k_page, key_offsets(0, KP // 32, D, 16), 0, 4 * D, K_BITS, HALVES
        )
    else:
        ka, kb, kc, kd = key_words(k_ptr + pool_row * k_page, 0, KC, K_BITS, K_SIGNS, HALVES)
    k2a, k2b, k2c = first, first, first
    if K2_BITS:
        k2a, k2b, k2c, _ = key_words(k2_ptr + pool_row * k2_page, 0, KC, K2_BITS, K2_BITS == 1, HALVES)
    tables = gl.allocate_shared_memory(
        gl.int32, [8 if MORE_LEVELS else 4, 32], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    if not AHEAD:
        rows_of_tables = _load_tables(lookup_ptr, MORE_LEVELS)
    if OPENS:
        in_this_order(first)
        x = _behind(x, unity)
        if HAS_WEIGHT and not SKETCH:
            weights = _behind(weights, unity)
    _store_tables(tables, rows_of_tables, MORE_LEVELS)
    blank, _ = high_and_low(gl.full([32, 2 * ROWS], 0.0, gl.float32, mma), 32, ROWS)
    by_row: gl.constexpr = gl.SliceLayout(0, blank.type.layout)
    row = gl.arange(0, ROWS, layout=by_row)
    if OPENS:
        if SKETCH:
            turned, lacking, lacking2, factor = numbers_of_parts(x, ROWS, 2 * D)
            bias = own_bias
        elif K2_BITS:
            turned, lacking, lacking2, factor, bias = turned_groups(
                x, weights, mean, signs, scale, unit, ROWS, D, HAS_WEIGHT, HAS_MEAN
            )
        else:
            turned, lacking, factor, bias = turned_queries(
                x, weights, mean, signs, scale, unit, ROWS, D, HAS_WEIGHT, HAS_MEAN
            )
        if CHAINED:
            _start_next()
        if K2_BITS:
            q0, q1 = query_operands(turned, ROWS, 2 * KC, mma)
            q2, q3 = q0, q0
            start2, _, _ = numbers_of_rows(lacking2, factor, bias, ROWS)
            start2 = gl.convert_layout(start2, gl.SliceLayout(0, mma), assert_trivial=True)[None, :]
        else:
            q0 = query_operand(turned, ROWS, D, mma)
            q1, q2, q3 = q0, q0, q0
        start, factor, bias = numbers_of_rows(lacking, factor, bias, ROWS)
        start = gl.convert_layout(start, gl.SliceLayout(0, mma), assert_trivial=True)[None, :]
        factor = gl.convert_layout(factor, by_row, assert_trivial=True)
        bias = gl.convert_layout(bias, by_row, assert_trivial=True)
    else:
        if CHAINED:
            _wait()
            _start_next()
        at = gl.arange(0, KP, layout=gl.SliceLayout(1, right))
        channel = at // 64 * 64 + at // 4 % 4 * 16 + at // 16 % 4 * 4 + at % 4
        q_column = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(0, right))
        q_ptr += (block * (K_PLANES * 2 * R) + q_column[None, :]) * KP + channel[:, None]
        q0 = gl.load(q_ptr)
        q1, q2, q3 = q0, q0, q0
        if K_PLANES > 1:
            q1 = gl.load(q_ptr + 2 * R * KP)
            q2 = q1
        if K_PLANES > 2:
            q2 = gl.load(q_ptr + 4 * R * KP)
        if K_PLANES > 3:
            q3 = gl.load(q_ptr + 6 * R * KP)
        s_column = gl.arange(0, 2 * ROWS, layout=gl.SliceLayout(0, mma))
        start = gl.load(start_ptr + block * (2 * R) + s_column)[None, :]
        factor = gl.load(factor_ptr + block * R + row)
        bias = gl.load(bias_ptr + block * R + row)
    start += gl.full([32, 2 * ROWS], 0, gl.int32, mma)
    if K2_BITS:
        start2 += gl.full([32, 2 * ROWS], 0, gl.int32, mma)
    else:
        start2 = start
    if PAGE_KEYS:
        page_scores_ptr += block * pages * (2 * R)
    m = gl.full([ROWS], -1e30, gl.float32, by_row)
    total = sums_of_lanes(blank, ROWS)
    weight = total
    weight2 = first  # no sums
    if V2_BITS:
        weight2 = total
    acc0, _ = high_and_low(gl.full([VP, 2 * ROWS], 0.0, gl.float32, mma), VP, ROWS)
    acc1, acc2, acc3 = first, first, first  # no sums
    if V_PLANES > 1:
        acc1 = acc0
    if V_PLANES > 2:
        acc2 = acc0
    if V_PLANES > 3:
        acc3 = acc0
    MORE: gl.constexpr = K2_BITS == 3 or V2_BITS == 3 or K2_BITS == 1 or V2_BITS == 1
    WHOLE: gl.constexpr = K_BITS == 3 or V_BITS == 3 or K_SIGNS or V_SIGNS or MORE
    KEPT: gl.constexpr = HALVES == 2 and WHOLE and max(D, DV) <= 128
    STEPS: gl.constexpr = 2 if KEPT else 1  # words of 3 bits stay in registers for both
    begin = 0
    for part in gl.static_range(2 if USED or STARTS else 1):  # the second: pages with tokens not in use
        for turns in range(begin // STEPS, clean // STEPS):
            va, vb, vc, vd = ka, kb, kc, kd  # in the place of values, which are loaded first
            v2a, v2b, v2c = first, first, first
            for half in gl.static_range(STEPS):
                (
                    pool_row,
                    ka,
                    kb,
                    kc,
                    kd,
                    va,
                    vb,
                    vc,
                    vd,
                    k2a,
                    k2b,
                    k2c,
                    v2a,
                    v2b,
                    v2c,
                    m,
                    total,
                    weight,
                    weight2,
                    acc0,
                    acc1,
                    acc2,
                    acc3,
                ) = page_step(
                    STEPS * turns + half,
                    pool_row,
                    ka,
                    kb,
                    kc,
                    kd,
                    va,
                    vb,
                    vc,
                    vd,
                    k2a,
                    k2b,
                    k2c,
                    v2a,
                    v2b,
                    v2c,
                    m,
                    total,
                    weight,
                    weight2,
                    acc0,
                    acc1,
                    acc2,
                    acc3,
                    q0,
                    q1,
                    q2,
                    q3,
                    start,
                    start2,
                    factor,
                    bias,
                    page_scores_ptr,
                    tables,
                    key_buffer,
                    value_buffer,
                    page_table_ptr,
                    k_ptr,
                    ks_ptr,
                    v_ptr,
                    vs_ptr,
                    k2_ptr,
                    k2s_ptr,
                    v2_ptr,
                    v2s_ptr,
                    k_page,
                    ks_page,
                    v_page,
                    vs_page,
                    k2_page,
                    k2s_page,
                    v2_page,
                    v2s_page,
                    first,
                    stride,
                    count,
                    lead,
                    unused,
                    used,
                    softcap,
                    mma,
                    KC,
                    VC,
                    R,
                    ROWS,
                    K_BITS,
                    V_BITS,
                    K_SIGNS,
                    V_SIGNS,
                    K_FINE,
                    V_FINE,
                    K2_BITS,
                    V2_BITS,
                    HALVES,
                    part == 1,
                    STARTS,
                    HEADS > 0,
                    CAPPED,
                    PAGE_KEYS,
                    half if KEPT else -1,
                    STAGED_K,
                    STAGED_V,
                )
        begin, clean = clean, HALVES * count

    if STAGED_K or STAGED_V:  # what follows takes the same shared memory
        async_copy.wait_group(0)
    if not CAPPED:
        m += bias
    written: gl.constexpr = gl.BlockedLayout(
        [1, 4], [32 * 4 // VP, VP // 4] if VP < 128 else [1, 32], [1, 1], [1, 0]
    )
    o_row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, written))
    value = gl.arange(0, VP, layout=gl.SliceLayout(0, written))
    kept = row_block * R + o_row < rows
    o_ptr += (slot * R + o_row[:, None]) * (V_PLANES * VP) + value[None, :]
    lacking = of_rows(gl.sum(weight, 0), acc0)
    if V_FINE:
        lacking = lacking * (1.0 + FINE)
    lacking2 = lacking
    if V2_BITS:
        lacking2 = of_rows(gl.sum(weight2, 0), acc0)
    gl.store(o_ptr, _in_order(2.0 * acc0 + lacking, ROWS, VP, written), mask=kept[:, None])
    if V_PLANES > 1:
        gl.store(o_ptr + VP, _in_order(2.0 * acc1 + lacking2, ROWS, VP, written), mask=kept[:, None])
    if V_PLANES > 2:
        gl.store(o_ptr + 2 * VP, _in_order(2.0 * acc2 + lacking, ROWS, VP, written), mask=kept[:, None])
    if V_PLANES > 3:
        gl.store(o_ptr + 3 * VP, _in_order(2.0 * acc3 + lacking, ROWS, VP, written), mask=kept[:, None])
    at = (gl.program_id(1).to(gl.int64) * R + row) * splits + split
    gl.store(m_ptr + at, m)
    gl.store(l_ptr + at, gl.convert_layout(gl.sum(total, 0), by_row, assert_trivial=True))
