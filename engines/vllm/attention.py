"""Attention over the tokens of a layer: decodes by our kernels, pieces of prompts by FlashAttention."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantpress.engines.vllm.layer_store import LayerStore
from quantpress.engines.vllm.step_plan import DecodePlan, PrefillPlan, PrefillRequest
from quantpress.kernels.attend import DenseSegment, PackedSegment, Segment, Visibility, attend
from quantpress.kernels.blocks import decode_blocks
from quantpress.kernels.layout import PAGE_TOKENS

CONTEXT_TOKENS = 65536
"""Packed tokens of a prompt's context that are decoded at a time: 268 MB of keys and values of 8 heads of 128."""


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys.

    Args:
        scaling: factor on q.k.
        softcap: scores become softcap * tanh(score / softcap), or None.
    """

    scaling: float
    softcap: float | None


def attend_decodes(
    store: LayerStore, plan: DecodePlan, query: Tensor, scores: Scores, output: Tensor
) -> None:
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
    segments: list[Segment] = [
        packed,
        DenseSegment(*store.recent, lengths=plan.recent_lengths, table=plan.recent_table),
    ]
    if store.settings.sinks:
        segments.insert(0, DenseSegment(*store.sinks, lengths=plan.sink_lengths, table=plan.sink_table))
    seen = Visibility(plan.queries, sum(segment.tokens for segment in segments))
    options = {"scaling": scores.scaling, "softcap": scores.softcap}
    if plan.rows is None and plan.queries == 1:
        attend(rows, segments, seen, out=output[: plan.requests].unsqueeze(2), **options)
        return
    found = attend(rows, segments, seen, **options).transpose(1, 2).flatten(0, 1)  # [R * q, Hq, Dv]
    found = found if plan.rows is None else found[plan.rows]
    output[: len(found)] = found


def attend_prefills(
    store: LayerStore,
    plan: PrefillPlan,
    states: tuple[Tensor, Tensor, Tensor],
    scores: Scores,
    output: Tensor,
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
    store: LayerStore,
    plan: PrefillPlan,
    states: tuple[Tensor, Tensor, Tensor],
    scores: Scores,
    output: Tensor,
) -> None:
    """Prompts that begin go together; each of the others is attended with its context, decoded."""
    begun = [request for request in plan.requests if not request.before]
    if begun:
        alone = len(begun) == len(plan.requests)
        rows = None if alone else torch.cat([torch.arange(*_span(plan, one)) for one in begun])
        rows = None if rows is None else rows.pin_memory().to(output.device, non_blocking=True)
        whole = states if rows is None else (states[0][rows], states[1][rows], states[2][rows])
        found, _ = _flash(whole, [one.tokens for one in begun], [one.tokens for one in begun], True, scores)
        if rows is None:
            output[: len(found)] = found
        else:
            output[rows] = found
    for request in plan.requests:
        if request.before:
            part = slice(*_span(plan, request))
            query, key, value = (x[part] for x in states)
            output[part] = _with_context(store, request, (query, key, value), scores)


def _span(plan: PrefillPlan, request: PrefillRequest) -> tuple[int, int]:
    return request.begin - plan.begin, request.begin - plan.begin + request.tokens


def _with_context(
    store: LayerStore, request: PrefillRequest, states: tuple[Tensor, Tensor, Tensor], scores: Scores
) -> Tensor:
    """[m, Hq, Dv]. The last piece of the context goes with the new tokens; pieces are joined by their sums."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    query, key, value = states
    tokens, pages = request.tokens, request.table.shape[2]
    step = CONTEXT_TOKENS // PAGE_TOKENS
    firsts = list(range(0, pages, step)) or [0]
    joined, sums = query, None
    for first in reversed(firsts):  # only the last piece has the causal mask
        keys, values = _decoded(store, request, first, min(first + step, pages))
        last = first == firsts[-1]
        if last:
            keys, values = torch.cat([*keys, key]), torch.cat([*values, value])
        else:
            keys, values = keys[0], values[0]
        found, found_sums = _flash((query, keys, values), [tokens], [len(keys)], last, scores)
        if sums is None:
            joined, sums = found, found_sums
        else:
            whole, whole_sums = torch.empty_like(found), torch.empty_like(sums)
            merge_attn_states(whole, found, found_sums, joined, sums, output_lse=whole_sums)
            joined, sums = whole, whole_sums
    return joined


def _decoded(
    store: LayerStore, request: PrefillRequest, first: int, last: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values, in parts [n, Hkv, D] in order, of pages `first` to `last` of a context.

    The first tokens come from the sink entry, if the request has one; those of the block that is partly filled,
    from its recent page.
    """
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    sinks = store.settings.sinks
    there = request.sink_lengths[0, :1].view(1, 1, 1) > 0
    for out, side, kept in zip(parts, store.blocks, store.sinks, strict=True):
        if last > first:
            out.append(decode_blocks(side, request.blocks[first:last], store.settings.dtype))
        if last > first == 0 and sinks:
            exact = kept.index_select(0, request.sink_table[0].long())[0].transpose(0, 1)  # [sinks, Hkv, D]
            out[0][:sinks] = torch.where(there, exact, out[0][:sinks])
    if last == request.table.shape[2] and request.recent_page is not None:
        used = request.before % PAGE_TOKENS
        for out, pool in zip(parts, store.recent, strict=True):
            out.append(pool.index_select(0, request.recent_page)[0, :, :used].transpose(0, 1))
    return parts


def _flash(
    states: tuple[Tensor, Tensor, Tensor], queries: list[int], tokens: list[int], causal: bool, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attention of sequences side by side, aligned at their last tokens: output [T, Hq, Dv], log-sum-exp [Hq, T]."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    query, key, value = states
    starts = [_starts(counts, query.device) for counts in (queries, tokens)]
    found, sums = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1],
        max_seqlen_q=max(queries),
        max_seqlen_k=max(tokens),
        softmax_scale=scores.scaling,
        softcap=scores.softcap or 0.0,
        causal=causal,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=query.shape[-1]),
    )[:2]
    return found, sums


def _starts(counts: list[int], device: torch.device) -> Tensor:
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
    starts[1:] = torch.tensor(counts).cumsum(0)
    return starts.pin_memory().to(device, non_blocking=True)
