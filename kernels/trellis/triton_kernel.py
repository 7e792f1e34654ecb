"""Viterbi's algorithm for trellis codes (Gluon), for NVIDIA GPUs from Ampere on.

Programs are single warps that loop over tiles of V vectors. A state is the last w bits of codes, and the next
code shifts it by b bits. So states j + k * G, with G = 2**(w - b), have the same successors, the states
K * j + c, and only the least of their K = 2**b errors goes on: one number for each of the G groups j. Half a
warp holds the errors of a vector, those of one group in one lane, or where w is 9 a whole warp, so that a
lane has 16 of them:

    states      [V, K (k), G / K, K (c)], k in registers
    groups      [V, G (j)], the upper w - 4 bits of j in lanes

So the least of K is found in registers, and one number in K changes lanes, at the next channel. Which of the
K it was takes b bits, and those of a lane at most a byte. The bytes of four channels are one word of the
buffer `kept`, from which a lane for each vector follows its path back.

Errors are not negative, so that their bits are in order as integers, of which Hopper compares three at a
time. Products and sums are rounded one by one, as in `quantpress.quantization.trellis.path`: the codes are
the same to the last one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantpress.kernels.gluon_index import index_along, layout_along


@gluon.constexpr_function
def _of_vectors(V, WINDOW, RANK):
    """Bits of the vector's index in a tensor [V, ...] of RANK: those in lanes, and those in registers."""
    bits = [[1 << i] + [0] * (RANK - 1) for i in range(8) if 1 << i < V]
    return bits[: 9 - WINDOW], bits[9 - WINDOW :]


@gluon.constexpr_function
def _states_layout(V, BITS, WINDOW):
    """The layout of states, [V, K, G / K, K]."""
    across, within = _of_vectors(V, WINDOW, 4)
    group = [[0, 0, 0, 1 << i] if i < BITS else [0, 0, 1 << (i - BITS), 0] for i in range(WINDOW - BITS)]
    unit = group[: 4 - BITS] + [[0, 1 << i, 0, 0] for i in range(BITS)] + within
    shape = [V, 1 << BITS, 1 << (WINDOW - 2 * BITS), 1 << BITS]
    return gl.DistributedLinearLayout(unit, group[4 - BITS :] + across, [], [], shape)


@gluon.constexpr_function
def _groups_layout(V, BITS, WINDOW):
    """The layout of states that are arranged by their own group, [V, K, G]."""
    across, within = _of_vectors(V, WINDOW, 3)
    unit = [[0, 0, 1 << i] for i in range(4 - BITS)] + [[0, 1 << i, 0] for i in range(BITS)] + within
    lane = [[0, 0, 16 >> BITS << i] for i in range(WINDOW - 4)] + across
    return gl.DistributedLinearLayout(unit, lane, [], [], [V, 1 << BITS, 1 << (WINDOW - BITS)])


@gluon.constexpr_function
def _channels_layout(V, WINDOW):
    """The layout of four neighbouring channels, [V, 4], in every lane of the vector."""
    across, within = _of_vectors(V, WINDOW, 2)
    lane = [[0, 0]] * (WINDOW - 4) + across
    return gl.DistributedLinearLayout([[0, 1], [0, 2], *within], lane, [], [], [V, 4])


@gluon.jit
def _lesser(a, b):
    return gl.minimum(a, b)


@gluon.jit
def _first_of_least(a, i, b, j):
    """The lesser of two numbers and its index; the first one's where they are equal."""
    return gl.minimum(a, b), gl.where(b < a, j, i)


@gluon.jit
def _in_step():
    """Let all lanes see what the others have stored."""
    gl.inline_asm_elementwise("bar.sync 0; // $0", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _errors(least, x, levels, V: gl.constexpr, BITS: gl.constexpr, WINDOW: gl.constexpr):
    """Squared errors of the states at a channel, as integers [V, K, G].

    least: of the groups before it, [V, G]; x: the channel, [V]; levels: [1, K, G / K, K].
    """
    K: gl.constexpr = 1 << BITS
    G: gl.constexpr = 1 << (WINDOW - BITS)
    layout: gl.constexpr = _states_layout(V, BITS, WINDOW)
    past = gl.convert_layout(gl.reshape(least, [V, K, G // K]), gl.SliceLayout(3, layout))
    x = gl.convert_layout(x, layout_along(0, 4, layout), assert_trivial=True)
    away = gl.expand_dims(gl.expand_dims(gl.expand_dims(x, 1), 2), 3) - levels
    errors = gl.reshape(away * away + gl.expand_dims(past, 3), [V, K, G])
    groups: gl.constexpr = _groups_layout(V, BITS, WINDOW)
    return gl.convert_layout(errors, groups, assert_trivial=True).to(gl.int32, bitcast=True)


@gluon.jit
def _forward(
    least,
    x_ptr,
    factor,
    levels,
    kept_ptr,
    turn,
    first,
    last,
    KEEP: gl.constexpr,
    D: gl.constexpr,
    V: gl.constexpr,
    BITS: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Go on over the channels from 4 * first to 4 * last, counted from channel 4 * turn of the vectors.

    least: errors of the groups before the first channel, [V, G]. Returns those behind the last one and, if
    KEEP, which of K they came from, which is kept for every channel.
    """
    K: gl.constexpr = 1 << BITS
    G: gl.constexpr = 1 << (WINDOW - BITS)
    LANES: gl.constexpr = 1 << (WINDOW - 4)
    layout: gl.constexpr = _groups_layout(V, BITS, WINDOW)
    groups: gl.constexpr = gl.SliceLayout(1, layout)
    which = gl.full([V, K, G], 0, gl.int32, layout) + index_along(1, K, 3, layout)
    shift = index_along(1, G, 2, groups) % (G // LANES) * BITS
    index = gl.full([V, G], 0, gl.int32, groups)
    ahead = gl.load(x_ptr + (first + turn) % (D // 4) * 4)
    for chunk in range(first, last):
        even, odd = gl.split(gl.reshape(ahead * factor, [V, 2, 2]))
        x0, x2 = gl.split(even)
        x1, x3 = gl.split(odd)
        channels = (x0, x1, x2, x3)
        ahead = gl.load(x_ptr + (chunk + 1 + turn) % (D // 4) * 4)
        kept = gl.full([V, G], 0, gl.int32, groups)
        for i in gl.static_range(4):
            errors = _errors(least, channels[i], levels, V, BITS, WINDOW)
            if KEEP:
                found, index = gl.reduce((errors, which), 1, _first_of_least)
                kept = kept | (index << (shift + 8 * i))
            else:
                found = gl.reduce(errors, 1, _lesser)
            least = found.to(gl.float32, bitcast=True)
        if KEEP:
            word = gl.sum(gl.reshape(kept, [V, LANES, G // LANES]), 2)
            words: gl.constexpr = word.type.layout
            to = index_along(0, V, 2, words) * LANES + index_along(1, LANES, 2, words)
            gl.store(kept_ptr + chunk * (V * LANES) + to, word)
    return least, index


@gluon.jit
def _nearest_end(least, index, V: gl.constexpr, BITS: gl.constexpr, WINDOW: gl.constexpr):
    """The states [V] of least error at the last channel; least and index: of `_forward`."""
    G: gl.constexpr = 1 << (WINDOW - BITS)
    errors = least.to(gl.int32, bitcast=True)
    best = gl.expand_dims(gl.reduce(errors, 1, _lesser), 1)
    ends = index * G + index_along(1, G, 2, gl.SliceLayout(1, _groups_layout(V, BITS, WINDOW)))
    return gl.reduce(gl.where(errors == best, ends, 1 << WINDOW), 1, _lesser)


@gluon.jit
def _back(state, kept_ptr, channel, V: gl.constexpr, BITS: gl.constexpr, WINDOW: gl.constexpr):
    """States [V] at a channel from those at the next one."""
    LANES: gl.constexpr = 1 << (WINDOW - 4)
    PER: gl.constexpr = (1 << (WINDOW - BITS)) // LANES
    group = state >> BITS
    own = gl.arange(0, V, layout=state.type.layout)
    word = gl.load(kept_ptr + channel // 4 * (V * LANES) + own * LANES + group // PER)
    which = (word >> (channel % 4 * 8 + group % PER * BITS)) & ((1 << BITS) - 1)
    return which << (WINDOW - BITS) | group


@gluon.jit
def search_kernel(
    unit_ptr,
    levels_ptr,
    kept_ptr,
    codes_ptr,
    vectors,
    factor,
    D: gl.constexpr,
    V: gl.constexpr,
    BITS: gl.constexpr,
    WINDOW: gl.constexpr,
    JOIN: gl.constexpr,
):
    """Codes of tail-biting paths, as `quantpress.quantization.trellis.nearest_path` finds them.

    unit: [N, D] float32, N vectors; levels: [2**w] float32, of coordinates of variance 1; kept: D / 4 * V
    words of int32 for each lane of a vector and each program, whatever they hold; codes: [N, D / 4] int32,
    written, four codes a word; factor: sqrt(D); D: a multiple of 8; V: vectors of a tile, a power of two from
    2 to 32; BITS: 1 to 4; WINDOW: w, 8 or 9; JOIN: channels on each side of a vector's beginning in the first
    search, a multiple of 4.
    """
    K: gl.constexpr = 1 << BITS
    G: gl.constexpr = 1 << (WINDOW - BITS)
    LANES: gl.constexpr = 1 << (WINDOW - 4)
    CHUNKS: gl.constexpr = D // 4
    NEAR: gl.constexpr = JOIN // 4
    states: gl.constexpr = _states_layout(V, BITS, WINDOW)
    groups: gl.constexpr = gl.SliceLayout(1, _groups_layout(V, BITS, WINDOW))
    channels: gl.constexpr = _channels_layout(V, WINDOW)
    alone: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    group = index_along(1, K, 4, states) * (G // K) + index_along(2, G // K, 4, states)
    levels = gl.load(levels_ptr + group * K + index_along(3, K, 4, states))
    group = index_along(1, G, 2, groups)
    own = gl.arange(0, V, layout=alone)
    kept_ptr += gl.program_id(0) * (CHUNKS * V * LANES)
    for tile in range(gl.program_id(0), (vectors + V - 1) // V, gl.num_programs(0)):
        row = gl.minimum(tile * V + index_along(0, V, 2, channels), vectors - 1).to(gl.int64)
        x_ptr = unit_ptr + row * D + index_along(1, 4, 2, channels)
        to = (tile * V + own).to(gl.int64) * CHUNKS
        there = tile * V + own < vectors
        ends = gl.full([V], 0, gl.int32, alone)
        for search in range(2):
            turn = (1 - search) * (CHUNKS - NEAR)  # the first search is around the beginning, ...
            last = 2 * NEAR + search * (CHUNKS - 2 * NEAR)
            kept_from = (1 - search) * (NEAR - 1)  # ... to which it is followed back
            begin = gl.expand_dims(gl.convert_layout(ends & (G - 1), gl.SliceLayout(1, groups)), 1)
            never = gl.full([V, G], float("inf"), gl.float32, groups)
            least = gl.where((begin == group) | (search == 0), 0.0, never)
            least, _ = _forward(
                least, x_ptr, factor, levels, kept_ptr, turn, 0, kept_from, False, D, V, BITS, WINDOW
            )
            least, index = _forward(
                least, x_ptr, factor, levels, kept_ptr, turn, kept_from, last, True, D, V, BITS, WINDOW
            )
            nearest = gl.convert_layout(_nearest_end(least, index, V, BITS, WINDOW), alone)
            state = gl.where(search == 0, nearest, ends)
            _in_step()
            for back in range(NEAR + search * (CHUNKS - NEAR)):
                chunk = last - 1 - back
                codes = state & (K - 1)
                for i in gl.static_range(3):
                    state = _back(state, kept_ptr, chunk * 4 + 2 - i, V, BITS, WINDOW)
                    codes = codes << 8 | (state & (K - 1))
                gl.store(codes_ptr + to + chunk, codes, mask=there & (search == 1))
                if chunk > 0:
                    state = _back(state, kept_ptr, chunk * 4 - 1, V, BITS, WINDOW)
            ends = state
            _in_step()
