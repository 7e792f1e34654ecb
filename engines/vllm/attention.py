"""Attention of decodes over the tokens of a layer, by our kernels."""

from dataclasses import dataclass

from torch import Tensor

from quantpress.engines.vllm.layer_store import LayerStore
from quantpress.engines.vllm.step_plan import DecodePlan
from quantpress.kernels.attend import DenseSegment, PackedSegment, Segment, Visibility, attend


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
    if plan.rows is None and plan.queries == 1:
        out = output[: plan.requests].unsqueeze(2)
        attend(rows, segments, seen, scaling=scores.scaling, softcap=scores.softcap, out=out)
        return
    found = attend(rows, segments, seen, scaling=scores.scaling, softcap=scores.softcap)
    found = found.transpose(1, 2).flatten(0, 1)  # [R * q, Hq, Dv]
    found = found if plan.rows is None else found[plan.rows]
    output[: len(found)] = found
