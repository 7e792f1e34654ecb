# mypy: allow-untyped-defs
"""Writes to an engine's memory on a GPU (Triton)."""

import triton
import triton.language as tl

from quantpress.kernels.encode.triton_kernel import CAREFUL, encode_page, held

SINK_SCALE = tl.constexpr(-1.0)
MOST = tl.constexpr(16)
"""Entries that a program of `pack_blocks_kernel` encodes at most."""


@triton.jit
def _put(
    x_ptr,
    pool_ptr,
    page,
    place,
    x_head,
    pool_page,
    pool_head,
    pool_token,
    heads,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
):
    """Store one token's vectors [heads, D] at `place` in `page`; x_ptr: the token's; HP, DP: padded."""
    head, channel = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
    inside = (head < heads) & (channel < D)
    x = tl.load(x_ptr + head * x_head + channel, mask=inside)
    at = page * pool_page + head.to(tl.int64) * pool_head + place * pool_token
    tl.store(pool_ptr + at + channel, x.to(pool_ptr.dtype.element_ty), mask=inside)


@triton.jit
def put_tokens_kernel(
    k_ptr,
    v_ptr,
    rows0_ptr,
    pool_k0_ptr,
    pool_v0_ptr,
    rows1_ptr,
    pool_k1_ptr,
    pool_v1_ptr,
    k_token,
    k_head,
    v_token,
    v_head,
    size0,
    k0_page,
    k0_head,
    k0_token,
    v0_page,
    v0_head,
    v0_token,
    size1,
    k1_page,
    k1_head,
    k1_token,
    v1_page,
    v1_head,
    v1_token,
    heads,
    D: tl.constexpr,
    DV: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    DVP: tl.constexpr,
):
    """Store one token (axis 0) in one target (axis 1, 0 or 1).

    k: [T, heads, D] and v: [T, heads, DV], channels contiguous, with strides *_token and *_head; rows: [T]
    int32, page * size + place, or -1; pool_k, pool_v: pools of pages of `size` tokens, written, channels
    contiguous, with strides *_page, *_head and *_token; HP, DP, DVP: heads, D and DV padded to powers of two.
    """
    token = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        row = tl.load(rows0_ptr + token)
        if row >= 0:
            page, place = (row // size0).to(tl.int64), (row % size0).to(tl.int64)
            _put(
                k_ptr + token * k_token,
                pool_k0_ptr,
                page,
                place,
                k_head,
                k0_page,
                k0_head,
                k0_token,
                heads,
                D,
                HP,
                DP,
            )
            _put(
                v_ptr + token * v_token,
                pool_v0_ptr,
                page,
                place,
                v_head,
                v0_page,
                v0_head,
                v0_token,
                heads,
                DV,
                HP,
                DVP,
            )
    else:
        row = tl.load(rows1_ptr + token)
        if row >= 0:
            page, place = (row // size1).to(tl.int64), (row % size1).to(tl.int64)
            _put(
                k_ptr + token * k_token,
                pool_k1_ptr,
                page,
                place,
                k_head,
                k1_page,
                k1_head,
                k1_token,
                heads,
                D,
                HP,
                DP,
            )
            _put(
                v_ptr + token * v_token,
                pool_v1_ptr,
                page,
                place,
                v_head,
                v1_page,
                v1_head,
                v1_token,
                heads,
                DV,
                HP,
                DVP,
            )


@triton.jit
def _store_page_keys(
    x_ptr,
    x_token,
    mean_ptr,
    weight_ptr,
    query_mean_ptr,
    query_variance_ptr,
    group,
    stored_mean_ptr,
    stored_sink_ptr,
    scratch_ptr,
    C: tl.constexpr,
    CP: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Store the mean and the sink of a page's transformed keys; returns the sink's token.

    x_ptr: the page's; mean, weight [C] and query_mean, query_variance [group, C]: of the head; stored_mean,
    stored_sink: the page's, [C]; scratch: [C] float32, the mean as it is stored, before the transform; CP: C
    padded. Everything is 0 in the channels beyond C, the weight 1.
    """
    channel, token = tl.arange(0, CP), tl.arange(0, 128)
    inside = channel < C
    shift, weight = tl.zeros([CP], tl.float32), tl.full([CP], 1.0, tl.float32)
    if MEAN:
        shift = tl.load(mean_ptr + channel, mask=inside, other=0.0)
    if WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=inside, other=1.0)
    at = x_ptr + token[:, None] * x_token + channel[None, :]
    keys = tl.load(at, mask=inside[None, :], other=0.0).to(tl.float32) - shift[None, :]
    dtype = stored_mean_ptr.dtype.element_ty
    largest = 65504.0 if dtype == tl.float16 else 3.3e38
    stored = tl.clamp(tl.sum(keys, 0) * (1.0 / 128) * weight, -largest, largest).to(dtype)
    tl.store(stored_mean_ptr + channel, stored, mask=inside)
    tl.store(scratch_ptr + channel, shift + tl.div_rn(stored.to(tl.float32), weight), mask=inside)
    likely = tl.zeros([128], tl.float32)
    if QUERIES:
        for head in range(group):
            query = tl.load(query_mean_ptr + head * C + channel, mask=inside, other=0.0)
            variance = tl.load(query_variance_ptr + head * C + channel, mask=inside, other=0.0)
            score = tl.sum(keys * (query[None, :] + 0.5 * keys * variance[None, :]), 1)
            share = tl.exp(score - tl.max(score, 0))
            likely += share / tl.sum(share, 0)
    else:
        rest = keys * weight[None, :] - stored.to(tl.float32)[None, :]
        likely = tl.sum(rest * rest, 1)
    sink = tl.argmax(likely, 0)
    key = tl.load(x_ptr + sink * x_token + channel, mask=inside, other=0.0).to(tl.float32)
    key = (key - shift) * weight
    tl.store(stored_sink_ptr + channel, tl.clamp(key, -largest, largest).to(dtype), mask=inside)
    return sink


@triton.jit
def _encode(
    x_ptr,
    x_page,
    x_head,
    x_token,
    mean_ptr,
    weight_ptr,
    matrix_ptr,
    words_ptr,
    words_head,
    words_block,
    scale_ptr,
    scale_head,
    scale_block,
    flag_ptr,
    largest,
    factor,
    pages_ptr,
    blocks,
    means_ptr,
    sinks_ptr,
    page_keys_head,
    page_keys_block,
    query_mean_ptr,
    query_variance_ptr,
    group,
    scratch_ptr,
    BOOK: tl.constexpr,
    ASM: tl.constexpr,
    SQUARES: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,
    BK: tl.constexpr,
    BITS: tl.constexpr,
    HALVES: tl.constexpr,
    RULE: tl.constexpr,
    VALUES: tl.constexpr,
    MEAN: tl.constexpr,
    WEIGHT: tl.constexpr,
    PAGE_KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Encode the entries of a program, of one head, into `blocks` [MOST], -1 where nothing is to be done.

    means to scratch, PAGE_KEYS and QUERIES are those of `pack_blocks_kernel`; the others are of one side.
    """
    head = tl.program_id(1).to(tl.int64)
    high = held(matrix_ptr, 0, HALVES, BK, CP)
    low = held(matrix_ptr, 1, HALVES, BK, CP)
    for turn in tl.range(0, MOST, num_stages=1):
        block = tl.max(tl.where(tl.arange(0, MOST) == turn, blocks, -1), 0).to(tl.int64)
        if block >= 0:
            page = tl.load(pages_ptr + tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64)
            taken_off = mean_ptr + head * C
            if PAGE_KEYS:
                taken_off = scratch_ptr + (tl.program_id(0) * tl.num_programs(1) + head) * C
                of_page = head * page_keys_head + block * page_keys_block
                tl.debug_barrier()  # the page before has been encoded
                sink = _store_page_keys(
                    x_ptr + page * x_page + head * x_head,
                    x_token,
                    mean_ptr + head * C,
                    weight_ptr + head * C,
                    query_mean_ptr + head * group * C,
                    query_variance_ptr + head * group * C,
                    group,
                    means_ptr + of_page,
                    sinks_ptr + of_page,
                    taken_off,
                    C,
                    CP,
                    MEAN,
                    WEIGHT,
                    QUERIES,
                )
                tl.debug_barrier()
            encode_page(
                x_ptr + page * x_page + head * x_head,
                x_token,
                taken_off,
                weight_ptr + head * C,
                flag_ptr,
                matrix_ptr,
                high,
                low,
                flag_ptr,
                1,
                words_ptr + head * words_head + block * words_block,
                scale_ptr + head * scale_head + block * scale_block,
                flag_ptr,
                largest,
                factor,
                BOOK,
                ASM,
                SQUARES,
                UNIT,
                0,
                C,
                CP,
                BK,
                BITS,
                HALVES,
                RULE,
                CAREFUL,
                VALUES,
                MEAN or PAGE_KEYS,
                WEIGHT,
                False,
            )
            if PAGE_KEYS:
                tl.debug_barrier()
                tl.store(scale_ptr + head * scale_head + block * scale_block + sink, SINK_SCALE)


@triton.jit(do_not_specialize=["entries", "group"])
def pack_blocks_kernel(
    pages_ptr,
    blocks_ptr,
    entries,
    flag_ptr,
    means_ptr,
    sinks_ptr,
    page_keys_head,
    page_keys_block,
    query_mean_ptr,
    query_variance_ptr,
    group,
    scratch_ptr,
    k_ptr,
    k_page,
    k_head,
    k_token,
    k_mean_ptr,
    k_weight_ptr,
    k_matrix_ptr,
    k_words_ptr,
    k_words_head,
    k_words_block,
    k_scale_ptr,
    k_scale_head,
    k_scale_block,
    k_largest,
    k_factor,
    v_ptr,
    v_page,
    v_head,
    v_token,
    v_mean_ptr,
    v_weight_ptr,
    v_matrix_ptr,
    v_words_ptr,
    v_words_head,
    v_words_block,
    v_scale_ptr,
    v_scale_head,
    v_scale_block,
    v_largest,
    v_factor,
    K_BOOK: tl.constexpr,
    K_ASM: tl.constexpr,
    K_SQUARES: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_C: tl.constexpr,
    K_CP: tl.constexpr,
    K_BK: tl.constexpr,
    K_BITS: tl.constexpr,
    K_HALVES: tl.constexpr,
    K_RULE: tl.constexpr,
    K_MEAN: tl.constexpr,
    K_WEIGHT: tl.constexpr,
    V_BOOK: tl.constexpr,
    V_ASM: tl.constexpr,
    V_SQUARES: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_C: tl.constexpr,
    V_CP: tl.constexpr,
    V_BK: tl.constexpr,
    V_BITS: tl.constexpr,
    V_HALVES: tl.constexpr,
    V_RULE: tl.constexpr,
    V_MEAN: tl.constexpr,
    V_WEIGHT: tl.constexpr,
    PAGE_KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Encode pages of one head (axis 1), keys (axis 2: 0) or values (1), into blocks.

    With G programs on axis 0, program g does entries g, g + G and so on, at most MOST of `entries`. Where
    none of them is to be written, it does nothing but read that.

    pages, blocks: [entries] int32, from where to where; a block below 0 is not written. flag: [1] int32,
    written and not read. For keys and values: vectors with strides *_page, *_head and *_token, channels
    contiguous; mean and weight [Hkv, C] float32, if MEAN and WEIGHT; matrix [HALVES, CP, CP], the rotation;
    words, int32, and scale, written, with strides *_head and *_block in words and scales; the other arguments
    are those of `encode_pages_kernel` for a group of C channels.

    If PAGE_KEYS, keys are encoded without the mean of their page, which goes to means, and one of them to
    sinks, both with the strides page_keys_head and page_keys_block, channels contiguous; scratch: [G, Hkv, C]
    float32. If QUERIES, that one is chosen by query_mean and query_variance [Hkv, group, C] float32.
    """
    entry = tl.program_id(0) + tl.arange(0, MOST) * tl.num_programs(0)
    blocks = tl.load(blocks_ptr + entry, mask=entry < entries, other=-1)
    if tl.max(blocks, 0) < 0:
        return
    if tl.program_id(2) == 0:
        _encode(
            k_ptr,
            k_page,
            k_head,
            k_token,
            k_mean_ptr,
            k_weight_ptr,
            k_matrix_ptr,
            k_words_ptr,
            k_words_head,
            k_words_block,
            k_scale_ptr,
            k_scale_head,
            k_scale_block,
            flag_ptr,
            k_largest,
            k_factor,
            pages_ptr,
            blocks,
            means_ptr,
            sinks_ptr,
            page_keys_head,
            page_keys_block,
            query_mean_ptr,
            query_variance_ptr,
            group,
            scratch_ptr,
            K_BOOK,
            K_ASM,
            K_SQUARES,
            K_UNIT,
            K_C,
            K_CP,
            K_BK,
            K_BITS,
            K_HALVES,
            K_RULE,
            False,
            K_MEAN,
            K_WEIGHT,
            PAGE_KEYS,
            QUERIES,
        )
    else:
        _encode(
            v_ptr,
            v_page,
            v_head,
            v_token,
            v_mean_ptr,
            v_weight_ptr,
            v_matrix_ptr,
            v_words_ptr,
            v_words_head,
            v_words_block,
            v_scale_ptr,
            v_scale_head,
            v_scale_block,
            flag_ptr,
            v_largest,
            v_factor,
            pages_ptr,
            blocks,
            means_ptr,
            sinks_ptr,
            page_keys_head,
            page_keys_block,
            query_mean_ptr,
            query_variance_ptr,
            group,
            scratch_ptr,
            V_BOOK,
            V_ASM,
            V_SQUARES,
            V_UNIT,
            V_C,
            V_CP,
            V_BK,
            V_BITS,
            V_HALVES,
            V_RULE,
            True,
            V_MEAN,
            V_WEIGHT,
            False,
            False,
        )
