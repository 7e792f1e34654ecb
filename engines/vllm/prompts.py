"""Attention of pieces of prompts over their context and over themselves: FlashAttention on a GPU."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantpress.engines.vllm.attention import Scores, attend_decodes
from quantpress.engines.vllm.layer_store import LayerStore
from quantpress.engines.vllm.step_plan import PrefillPlan, PrefillRequest, StepPlan
from quantpress.kernels.attend import DenseSegment, PackedSegment, Segment, Visibility, attend
from quantpress.kernels.blocks import decode_blocks
from quantpress.kernels.layout import PAGE_TOKENS

CONTEXT_TOKENS = 65536
"""Packed tokens of a context that are decoded at a time: 268 MB of keys and values of 8 heads of 128."""


States = tuple[Tensor, Tensor, Tensor]
"""Queries [T, Hq, D], keys [T, Hkv, D] and values [T, Hkv, Dv]."""

Recent = tuple[Tensor, Tensor] | None
"""Keys and values [1, Hkv, 128, D] of the partly filled block of a request, if there is one."""


def attend_prefills(
    store: LayerStore,
    plan: PrefillPlan,
    unfilled: list[Recent],
    states: States,
    scores: Scores,
    output: Tensor,
) -> None:
    """Attention of pieces of prompts over themselves and what is stored before them; they are stored, too.

    Args:
        store: the layer's tokens.
        plan: of the step.
        unfilled: what `LayerStore.unfilled` copied before the pieces were stored.
        states: queries [Tp, Hq, D], keys [Tp, Hkv, D] and values [Tp, Hkv, Dv].
        scores: how scores are made.
        output: [Tp, Hq, Dv], written.
    """
    if states[0].is_cuda and states[0].dtype in (torch.float16, torch.bfloat16):
        _by_flash_attention(store, plan, unfilled, states, scores, output)
        return
    for request, recent in zip(plan.requests, unfilled, strict=True):
        part = slice(*_span(plan, request))
        query, key, value = (x[part].transpose(0, 1).unsqueeze(0) for x in states)
        segments = [*_context_segments(store, request, recent), DenseSegment(key, value)]
        seen = Visibility(request.tokens, sum(segment.tokens for segment in segments))
        found = attend(query, segments, seen, scaling=scores.scaling, softcap=scores.softcap)
        output[part] = found[0].transpose(0, 1)


def _context_segments(store: LayerStore, request: PrefillRequest, recent: Recent) -> Iterator[Segment]:
    if request.table.shape[2]:
        if store.settings.sinks:
            yield DenseSegment(*store.sinks, lengths=request.sink_lengths, table=request.sink_table)
        keys, values = store.pool
        yield PackedSegment(
            keys, values, request.packed_lengths, table=request.table, starts=request.packed_starts
        )
    if recent is not None:
        used = request.before % PAGE_TOKENS
        yield DenseSegment(*(states[:, :, :used] for states in recent))


def _by_flash_attention(
    store: LayerStore,
    plan: PrefillPlan,
    unfilled: list[Recent],
    states: States,
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
    for request, recent in zip(plan.requests, unfilled, strict=True):
        if request.before:
            part = slice(*_span(plan, request))
            query, key, value = (x[part] for x in states)
            output[part] = _with_context(store, request, recent, (query, key, value), scores)


def _span(plan: PrefillPlan, request: PrefillRequest) -> tuple[int, int]:
    return request.begin - plan.begin, request.begin - plan.begin + request.tokens


def _with_context(
    store: LayerStore, request: PrefillRequest, recent: Recent, states: States, scores: Scores
) -> Tensor:
    """[m, Hq, Dv]. The last part of the context goes with the new tokens; parts are joined by their sums."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    query, key, value = states
    tokens, pages = request.tokens, request.table.shape[2]
    step = CONTEXT_TOKENS // PAGE_TOKENS
    firsts = list(range(0, pages, step)) or [0]
    joined, sums = query, None
    for first in reversed(firsts):  # only the last piece has the causal mask
        parts = _decoded(store, request, recent, first, min(first + step, pages))
        last = first == firsts[-1]
        if last:
            keys, values = torch.cat([*parts[0], key]), torch.cat([*parts[1], value])
        else:
            keys, values = parts[0][0], parts[1][0]
        found, found_sums = _flash((query, keys, values), [tokens], [len(keys)], last, scores)
        if sums is None:
            joined, sums = found, found_sums
        else:
            whole, whole_sums = torch.empty_like(found), torch.empty_like(sums)
            merge_attn_states(whole, found, found_sums, joined, sums, output_lse=whole_sums)
            joined, sums = whole, whole_sums
    return joined


def _decoded(
    store: LayerStore, request: PrefillRequest, recent: Recent, first: int, last: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values, in parts [n, Hkv, D] in order, of pages `first` to `last` of a context.

    The first tokens come from the sink entry, if the request has one; those of the partly filled block, from
    its recent page.
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
    if last == request.table.shape[2] and recent is not None:
        used = request.before % PAGE_TOKENS
        for out, states in zip(parts, recent, strict=True):
            out.append(states[0, :, :used].transpose(0, 1))
    return parts


def _flash(
    states: States, queries: list[int], tokens: list[int], causal: bool, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attention of sequences side by side, aligned at their last tokens.

    Returns:
        Output [T, Hq, Dv] and log-sum-exp [Hq, T].
    """
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


def run_step(
    store: LayerStore, plan: StepPlan, states: States, scores: Scores, output: Tensor, tokens: int
) -> None:
    """Store the tokens of a step and attend them.

    Everything is stored before anything is read: vLLM finds a block in its prefix cache as soon as it has
    planned the step that fills it, so that another request of the same step may read it.

    Args:
        store: the layer's tokens.
        plan: of the step.
        states: queries [T, Hq, D], keys [T, Hkv, D] and values [T, Hkv, Dv], and padding behind them.
        scores: how scores are made.
        output: [T, Hq, Dv], written.
        tokens: T.
    """
    query, key, value = states
    decodes, prefills = plan.decodes, plan.prefills
    part = slice(0 if prefills is None else prefills.begin, tokens)
    unfilled = [] if prefills is None else store.unfilled(prefills)
    if prefills is not None:
        store.write_prefills(key[part], value[part], prefills)
    if decodes is not None:
        store.write_decodes(key, value, decodes)
        attend_decodes(store, decodes, query, scores, output)
    if prefills is not None:
        pieces = query[part], key[part], value[part]
        attend_prefills(store, prefills, unfilled, pieces, scores, output[part])
