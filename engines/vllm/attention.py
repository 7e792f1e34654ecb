"""Attention over the tokens of a layer: decodes by our kernels, pieces of prompts by FlashAttention."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.engines.vllm.layer_store import LayerStore
from quantpress.engines.vllm.step_plan import DecodePlan, PrefillPlan, PrefillRequest
from quantpress.kernels.attend import DenseSegment, PackedSegment, Segment, Visibility, attend
from quantpress.kernels.layout import PAGE_TOKENS

CONTEXT_TOKENS = 16384
"""Packed tokens of a prompt's context that are decoded at a time."""


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys.

    Args:
        scaling: factor on q.k.
        softcap: scores become softcap * tanh(score / softcap), or None.
    """

    scaling: float
    softcap: float | None


def attend_decodes(store: LayerStore, plan: DecodePlan, query: Tensor, scores: Scores, output: Tensor) -> None:
    """Attention of the new tokens of decodes, which are stored already.

    Args:
        store: the layer's tokens.
        plan: of the step.
        query: [T, Hq, D].
        scores: how scores are made.
        output: [T, Hq, Dv], written.
    """
    rows = query[: plan.requests * plan.queries] if plan.tokens is None else query[plan.tokens]
    rows = rows.view(plan.requests, plan.queries, *query.shape[1:]).transpose(1, 2)
    keys, values = store.pool
    packed = PackedSegment(
        keys, values, plan.packed_lengths, table=plan.table, starts=plan.packed_starts, schedule=plan.schedule
    )
    segments: list[Segment] = [packed, DenseSegment(*store.recent, lengths=plan.recent_lengths, table=plan.recent_table)]
    if store.settings.sinks:
        segments.insert(0, DenseSegment(*store.sinks, lengths=plan.sink_lengths, table=plan.sink_table))
    seen = Visibility(plan.queries, sum(segment.tokens for segment in segments))
    found = attend(rows, segments, seen, scaling=scores.scaling, softcap=scores.softcap)
    found = found.transpose(1, 2).flatten(0, 1)  # [R * q, Hq, Dv]
    output[: len(found) if plan.rows is None else len(plan.rows)] = found if plan.rows is None else found[plan.rows]


def attend_prefills(
    store: LayerStore, plan: PrefillPlan, states: tuple[Tensor, Tensor, Tensor], scores: Scores, output: Tensor
) -> None:
    """Attention of pieces of prompts over themselves and what is stored before them; they are not stored yet.

    Args:
        store: the layer's tokens.
        plan: of the step.
        states: queries [Tp, Hq, D], keys [Tp, Hkv, D] and values [Tp, Hkv, Dv].
        scores: how scores are made.
        output: [Tp, Hq, Dv], written.
    """
    if states[0].is_cuda and states[0].dtype in (torch.float16, torch.bfloat16):
        _by_flash_attention(store, plan, states, scores, output)
        return
    for request in plan.requests:
        part = slice(request.begin - plan.begin, request.begin - plan.begin + request.tokens)
        query, key, value = (x[part].transpose(0, 1).unsqueeze(0) for x in states)
        segments = [*_context_segments(store, request), DenseSegment(key, value)]
        seen = Visibility(request.tokens, sum(segment.tokens for segment in segments))
        found = attend(query, segments, seen, scaling=scores.scaling, softcap=scores.softcap)
        output[part] = found[0].transpose(0, 1)


def _context_segments(store: LayerStore, request: PrefillRequest) -> Iterator[Segment]:
    if request.table.shape[2]:
        if store.settings.sinks:
            yield DenseSegment(*store.sinks, lengths=request.sink_lengths, table=request.sink_table)
        keys, values = store.pool
        yield PackedSegment(
            keys, values, request.packed_lengths, table=request.table, starts=request.packed_starts
        )
    if request.recent_page is not None:
        used = request.before % PAGE_TOKENS
        yield DenseSegment(*(pool[request.recent_page, :, :used] for pool in store.recent))


def _by_flash_attention(
    store: LayerStore, plan: PrefillPlan, states: tuple[Tensor, Tensor, Tensor], scores: Scores, output: Tensor
) -> None:
    """The context is decoded in pieces; each is attended apart, and joined by the logarithms of the sums."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    bounds = [request.begin - plan.begin for request in plan.requests]
    bounds.append(bounds[-1] + plan.requests[-1].tokens)
    longest = max(request.tokens for request in plan.requests)
    own, sums = _flash(states, (bounds, bounds), (longest, longest), True, scores)
    for request in plan.requests:
        begin = request.begin - plan.begin
        part = slice(begin, begin + request.tokens)
        for keys, values in _context(store, request):
            queries, tokens = request.tokens, keys.shape[0]
            one = (states[0][part], keys, values)
            found, found_sums = _flash(one, ([0, queries], [0, tokens]), (queries, tokens), False, scores)
            joined, joined_sums = torch.empty_like(found), torch.empty_like(found_sums)
            mine = sums[:, part].contiguous()
            merge_attn_states(joined, found, found_sums, own[part], mine, output_lse=joined_sums)
            own[part], sums[:, part] = joined, joined_sums
    output[: bounds[-1]] = own


def _flash(
    states: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[list[int], list[int]],
    longest: tuple[int, int],
    causal: bool,
    scores: Scores,
) -> tuple[Tensor, Tensor]:
    """Attention of sequences side by side: output [T, Hq, Dv], and log-sum-exp [Hq, T]."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    query, key, value = states
    starts = [torch.tensor(bound, dtype=torch.int32).to(query.device, non_blocking=True) for bound in bounds]
    found, sums = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1],
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        softmax_scale=scores.scaling,
        softcap=scores.softcap or 0.0,
        causal=causal,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=query.shape[-1]),
    )[:2]
    return found, sums


def _context(store: LayerStore, request: PrefillRequest) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of the tokens before a piece, at most `CONTEXT_TOKENS` and a page at a time, [n, Hkv, D]."""
    pages = request.table.shape[2]
    step = CONTEXT_TOKENS // PAGE_TOKENS
    for first in range(0, pages, step):
        yield _with_sinks(store, request, store.context(request.table[:, :, first : first + step]), first == 0)
    if request.recent_page is not None:
        used = request.before % PAGE_TOKENS
        keys, values = (pool[request.recent_page, :, :used][0].transpose(0, 1).contiguous() for pool in store.recent)
        yield keys, values


def _with_sinks(
    store: LayerStore, request: PrefillRequest, states: tuple[Tensor, Tensor], has_first: bool
) -> tuple[Tensor, Tensor]:
    """The same with the first tokens from the sink entry, if the request has one."""
    sinks = store.settings.sinks
    if has_first and sinks:
        there = request.sink_lengths[0, :1].view(1, 1, 1) > 0
        for kept, decoded in zip(store.sinks, states, strict=True):
            exact = kept[request.sink_table[0, 0].long()].transpose(0, 1)  # [sinks, Hkv, D]
            decoded[:sinks] = torch.where(there, exact, decoded[:sinks])
    return states
