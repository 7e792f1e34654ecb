"""The last launch without a matrix (Gluon): for Hadamard rotations, one or two, and no planes of filters.

Every lane of a warp holds a few channels of all partial sums that the warp joins, and all of their scores, so
that joining them needs no other lane. The warp then rotates its sum back by a fast Walsh-Hadamard transform,
whose butterflies are between numbers of one lane, and adds its share of the 16-bit tokens. Where several
warps share a row, they meet once, in shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpress.kernels.attend.tiles import exp2

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def by_lane(WARPS):
    """[WARPS, N]: N numbers of each warp, over its lanes."""
    return gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def by_warp(WARPS):
    """[WARPS]: one number of each warp, in all of its lanes."""
    return gl.SliceLayout(1, by_lane(WARPS))


@gluon.constexpr_function
def by_sum(DV, SIZE, WARPS):
    """[WARPS, SIZE, DV]: SIZE partial sums of each warp, up to 16 bytes of each side by side in a lane."""
    return gl.BlockedLayout([1, SIZE, min(DV // 32, 4)], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def turning(DV, WARPS, STEP):
    """[WARPS, DV] after STEP of five steps of the transform; at first as the sum over `by_sum` leaves it.

    At first lanes have bits 2 to 6 of a channel in their number (bits 1 to 5 if DV is 64), and the other bits
    in registers. Each step swaps the first bit in registers with the next one in the number of the lane.
    """
    registers = [0, 1, 7] if DV == 256 else list(range(DV.bit_length() - 6))
    lanes = [bit for bit in range(DV.bit_length() - 1) if bit not in registers]
    for step in range(STEP):
        registers[0], lanes[step] = lanes[step], registers[0]
    warps = [[1 << bit, 0] for bit in range(WARPS.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        [[0, 1 << bit] for bit in registers], [[0, 1 << bit] for bit in lanes], warps, [], [WARPS, DV]
    )


@gluon.constexpr_function
def by_part(DV, PARTS, WARPS):
    """[rows, PARTS, DV] of PARTS warps a row: all parts of a channel in one lane."""
    return gl.BlockedLayout([1, PARTS, 1], [1, 1, 32], [WARPS // PARTS, 1, PARTS], [2, 1, 0])


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
        "griddepcontrol.launch_dependents; // $0", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _like(x, layout: gl.constexpr):
    """The same numbers in a layout that each thread holds them in already."""
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _load_sums(
    o_ptr,
    m_ptr,
    l_ptr,
    first,
    end,
    count,
    block,
    local,
    order_ptr,
    STEP: gl.constexpr,
    SIZE: gl.constexpr,
    DV: gl.constexpr,
    R: gl.constexpr,
    WARPS: gl.constexpr,
    ORDERED: gl.constexpr,
):
    """Partial sums first, first + STEP, ... below `end` of the `count` of each warp's row, at most SIZE.

    first, block, local: [WARPS]. Returns o [WARPS, SIZE, DV], its m [WARPS, SIZE] in all lanes, and m and l
    [WARPS, SIZE] over the lanes, which total up with fewer registers. ORDERED: with channel order[i] in the
    place of channel i.
    """
    sums: gl.constexpr = by_sum(DV, SIZE, WARPS)
    scores: gl.constexpr = gl.SliceLayout(2, sums)
    warps: gl.constexpr = gl.SliceLayout(1, scores)
    left, row = end - first, (block * R + local) * count + first
    step = gl.arange(0, SIZE, layout=gl.SliceLayout(0, by_lane(WARPS)))[None, :] * STEP
    live = step < left[:, None]
    lane_m = gl.load(m_ptr + row[:, None] + step, mask=live, other=-1e30)
    lane_l = gl.load(l_ptr + row[:, None] + step, mask=live, other=0.0)
    step = gl.arange(0, SIZE, layout=gl.SliceLayout(0, scores))[None, :] * STEP
    live = step < _like(left, warps)[:, None]
    m = gl.load(m_ptr + _like(row, warps)[:, None] + step, mask=live, other=-1e30)
    channel = gl.arange(0, DV, layout=gl.SliceLayout(0, gl.SliceLayout(1, sums)))
    if ORDERED:
        channel = gl.load(order_ptr + channel).to(gl.int32)
    channel = channel[None, None, :]
    start = _like(((block * count + first) * R + local) * DV, warps)[:, None, None]
    o_ptr = (o_ptr + start) + (step * (R * DV))[:, :, None]
    o = gl.load(o_ptr + channel, mask=live[:, :, None], other=0.0)
    return o, m, lane_m, lane_l


@gluon.jit
def _add(y, other, m, total, sums, DV: gl.constexpr, WARPS: gl.constexpr):
    """Add what `_load_sums` returns to y [WARPS, DV], m and total [WARPS].

    `other`, as y, is relative to m.
    """
    part_o, part_m, lane_m, lane_l = sums
    new = gl.maximum(m, _like(gl.max(part_m, 1), by_warp(WARPS)))
    weight = exp2(part_m - _like(new, gl.SliceLayout(1, part_m.type.layout))[:, None])
    decay = exp2(m - new)
    total = total * decay + gl.sum(lane_l * exp2(lane_m - new[:, None]), 1)
    decay = _like(decay, gl.SliceLayout(1, y.type.layout))[:, None]
    more = gl.sum(part_o * weight[:, :, None], 1)
    return y * decay + _like(more, turning(DV, WARPS, 0)), other * decay, new, total


@gluon.jit
def _butterfly(x, BIT: gl.constexpr, DV: gl.constexpr, WARPS: gl.constexpr):
    """Sums and differences of channels that differ in one bit, which registers of one lane hold."""
    pairs = x.reshape([WARPS, DV >> (BIT + 1), 2, 1 << BIT]).permute([0, 1, 3, 2])
    a, b = gl.split(pairs)
    return gl.join(a + b, a - b).permute([0, 1, 3, 2]).reshape([WARPS, DV])


@gluon.jit
def _transformed(x, DV: gl.constexpr, WARPS: gl.constexpr, GROUPS: gl.constexpr):
    """x [WARPS, DV] times the matrix of 1 and -1 of a Walsh-Hadamard transform, in the last layout.

    If GROUPS is 2, each half of the channels has one of its own.
    """
    IN_LANES: gl.constexpr = 1 if DV == 64 else 2
    for bit in gl.static_range(IN_LANES):
        x = _butterfly(x, bit, DV, WARPS)
    if DV == 256:
        x = _butterfly(x, 7, DV, WARPS)
    for step in gl.static_range(5):
        x = gl.convert_layout(x, turning(DV, WARPS, step + 1))
        if GROUPS == 1 or step < 4:
            x = _butterfly(x, IN_LANES + step, DV, WARPS)
    return _like(x, turning(DV, WARPS, 5))


@gluon.jit
def _meeting(x, m, total, DV: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr):
    """x [WARPS, DV], m and total [WARPS] of PARTS warps a row -> [rows, DV] and [rows] twice."""
    ROWS: gl.constexpr = WARPS // PARTS
    parts: gl.constexpr = by_part(DV, PARTS, WARPS)
    rows_of_sums: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    rows_of_scores: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [ROWS, PARTS, DV], rows_of_sums)
    scores = gl.allocate_shared_memory(gl.float32, [ROWS, PARTS], rows_of_scores)
    totals = gl.allocate_shared_memory(gl.float32, [ROWS, PARTS], rows_of_scores)
    sums.store(x.reshape([ROWS, PARTS, DV]))
    scores.store(m.reshape([ROWS, PARTS]))
    totals.store(total.reshape([ROWS, PARTS]))
    part_m = scores.load(gl.SliceLayout(2, parts))
    m = gl.max(part_m, 1)
    weight = exp2(part_m - m[:, None])
    total = gl.sum(totals.load(gl.SliceLayout(2, parts)) * weight, 1)
    return gl.sum(sums.load(parts) * weight[:, :, None], 1), m, total


_NUMBERS = ["splits", "tiles", "rows", "queries", "group", "kv_heads", "blocks", "into"]


@gluon.jit(do_not_specialize=_NUMBERS)
def merge_by_warps_kernel(
    o_ptr,
    m_ptr,
    l_ptr,
    dense_o_ptr,
    dense_m_ptr,
    dense_l_ptr,
    sinks_ptr,
    rotation_ptr,
    out_ptr,
    schedule_ptr,
    splits,
    tiles,
    rows,
    queries,
    group,
    kv_heads,
    blocks,
    into,
    unit,
    order_ptr,
    slots_ptr,
    DV: gl.constexpr,
    R: gl.constexpr,
    PARTS: gl.constexpr,
    WARPS: gl.constexpr,
    SIZE: gl.constexpr,
    TILES: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    SCHEDULED: gl.constexpr,
    PARTIAL: gl.constexpr,
    GROUPS: gl.constexpr,
    SHARED: gl.constexpr,
    SLOTS: gl.constexpr,
    AHEAD: gl.constexpr,
    CHAINED: gl.constexpr,
):
    """Join the splits of WARPS / PARTS rows (axis 0) of one (batch, KV head) (axis 1), PARTS warps a row.

    As `by_matrix.merge_kernel`, but for this: rotation is that of a Walsh-Hadamard matrix with signed
    columns, of which the first row is read; WARPS: of the program; SIZE, TILES: partial sums over packed and
    over 16-bit tokens that a warp joins at a time. Heads with page tables have a schedule. AHEAD: the next
    kernel may start before this one has ended.

    If GROUPS is 2, each half of the channels in code space has a rotation of its own. Their first rows are
    read, one after the other, with the units of levels in them. DV is then 128; order [BH, DV] int16, slots,
    SHARED and SLOTS are as for `merge_parts_kernel`.
    """
    head = gl.program_id(1).to(gl.int64)
    begin, end = 0, splits
    if SCHEDULED:
        begin, end = gl.load(schedule_ptr + head * 2), gl.load(schedule_ptr + head * 2 + 1)
    ROWS: gl.constexpr = WARPS // PARTS
    warp = gl.arange(0, WARPS, layout=by_warp(WARPS))
    part = warp % PARTS
    row = gl.minimum(gl.program_id(0) * ROWS + warp // PARTS, rows - 1)
    block, local = head * blocks + row // R, row % R
    holder = block
    if SCHEDULED:
        holder = head * 0 + row // R
    if GROUPS == 2:
        own = head
        if SLOTS:
            own = gl.load(slots_ptr + head // kv_heads) * kv_heads + head % kv_heads
        if SHARED:
            own = head % kv_heads
        order_ptr += own * DV
    turned: gl.constexpr = turning(DV, WARPS, 5)
    signs = gl.load(rotation_ptr + gl.arange(0, DV, layout=gl.SliceLayout(0, turned))) * unit
    packed, dense = (o_ptr, m_ptr, l_ptr), (dense_o_ptr, dense_m_ptr, dense_l_ptr)
    if CHAINED:
        _wait()
    m = gl.full([WARPS], -1e30, gl.float32, by_warp(WARPS))
    total = gl.full([WARPS], 0.0, gl.float32, by_warp(WARPS))
    y = gl.full([WARPS, DV], 0.0, gl.float32, turning(DV, WARPS, 0))
    z = y
    sums = _load_sums(
        *packed, begin + part, end, splits, holder, local, None, PARTS, SIZE, DV, R, WARPS, False
    )
    if not PARTIAL:
        dense_sums = _load_sums(
            *dense, part, tiles, tiles, block, local, order_ptr, PARTS, TILES, DV, R, WARPS, GROUPS == 2
        )
        z, y, m, total = _add(z, y, m, total, dense_sums, DV, WARPS)
        # Without this loop the assembler puts loads off until they are needed, which takes 1 us longer.
        for start in range(PARTS * TILES, tiles, PARTS * TILES):
            more = _load_sums(
                *dense,
                start + part,
                tiles,
                tiles,
                block,
                local,
                order_ptr,
                PARTS,
                TILES,
                DV,
                R,
                WARPS,
                GROUPS == 2,
            )
            z, y, m, total = _add(z, y, m, total, more, DV, WARPS)
    y, z, m, total = _add(y, z, m, total, sums, DV, WARPS)
    for start in range(begin + PARTS * SIZE, end, PARTS * SIZE):
        more = _load_sums(
            *packed, start + part, end, splits, holder, local, None, PARTS, SIZE, DV, R, WARPS, False
        )
        y, z, m, total = _add(y, z, m, total, more, DV, WARPS)
    if AHEAD and CHAINED:  # behind its loads: what the next kernel loads first would go before them
        _start_next()
    x = _transformed(y, DV, WARPS, GROUPS) * signs[None, :]
    if not PARTIAL:
        x += gl.convert_layout(z, turned)
    if PARTS > 1:
        x, m, total = _meeting(x, m, total, DV, PARTS, WARPS)
    by_row: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    value = gl.arange(0, DV, layout=gl.SliceLayout(0, x.type.layout))
    if GROUPS == 2:
        value = gl.load(order_ptr + value).to(gl.int32)
    value = value[None, :]
    row = gl.minimum(gl.program_id(0) * ROWS + gl.arange(0, ROWS, layout=by_row), rows - 1)
    m, total = _like(m, by_row), _like(total, by_row)
    if PARTIAL:
        first, local = (head * blocks + row // R) * R * tiles, row % R
        gl.store(dense_o_ptr + (first + into * R + local)[:, None] * DV + value, x)
        gl.store(dense_m_ptr + first + local * tiles + into, m)
        gl.store(dense_l_ptr + first + local * tiles + into, total)
    else:
        if HAS_SINKS:
            sink = gl.load(sinks_ptr + head % kv_heads * group + row // queries).to(gl.float32) * LOG2_E
            new = gl.maximum(m, sink)
            decay = exp2(m - new)
            x = x * decay[:, None]
            total = total * decay + exp2(sink - new)
        total = gl.where(total == 0, 1.0, total)  # nothing in use
        gl.store(out_ptr + (head * rows + row)[:, None] * DV + value, x / total[:, None])
