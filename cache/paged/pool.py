"""`PagePool`: the memory of paged attention, for an engine that manages blocks itself.

A *block* is the memory of a packed page of 128 tokens in every layer and KV head. Beside its blocks, a
sequence has 16-bit tokens and the channel transforms that its pages were packed with. Its tokens::

    [ sinks: first `sink_tokens`, 16 bits | whole pages, one block each | window: the newest, 16 bits ]

While a sequence has no page, all its tokens are in the window. When its first pages are packed, the sinks
move out of the window, and mean key and channel weights are computed from the packed tokens. Bits of
different tokens share words, so a page is written as a whole and never changes: sequences may share blocks,
and no token is quantized twice.

The caller names sequences (by index) and blocks. Only `fill` and `pack` wait for the device, because they
check for NaN and infinity.
"""

import sys

import torch

from quantpress.cache.paged.buffers import PoolBuffers
from quantpress.cache.paged.plan import PagedPlan, paged_plan
from quantpress.cache.paged.storage import PoolStorage
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend


class PagePool(PoolStorage):
    """Memory of sequences in a number of layers, and attention over it.

    Arguments and attributes are those of `PoolStorage`. A serving engine calls, in each step: `fill` for new
    prompts, `pack` for windows that would overflow, `plan`, and for every layer `write` and `attend`. The
    last three may be captured in a CUDA graph.
    """

    def plan(
        self,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        page_counts: torch.Tensor,
        sequences: torch.Tensor | None = None,
        *,
        most_queries: int = sys.maxsize,
    ) -> PagedPlan:
        """Page table and lengths that all layers of a step share. Runs on the device only; may be captured.

        Args:
            block_tables: [B, P] int32, the blocks of each sequence; any valid block behind its last one.
            context_lens: [B] int32, tokens of each sequence, those of this step included.
            page_counts: [B] int32, pages of each sequence.
            sequences: [B] int64, the index of each sequence; None: all sequences in order.
            most_queries: most query tokens that `attend` accepts. If a sequence has pages, all its query
                tokens but the first must be in its window.

        Raises:
            InvalidInputError: a tensor has the wrong dtype or shape.
        """
        sinks = self.settings.sink_tokens
        if sequences is None and block_tables.shape[0] != self.size.sequences:
            raise InvalidInputError(
                f"block_tables have {block_tables.shape[0]} rows for {self.size.sequences} sequences; give "
                "`sequences`, the index of each row's sequence"
            )
        return paged_plan(block_tables, context_lens, page_counts, sequences, self.size, sinks, most_queries)

    @torch.no_grad()
    def write(self, keys: torch.Tensor, values: torch.Tensor, plan: PagedPlan, *, layer: int = 0) -> None:
        """Write the newest tokens of every sequence of a plan to its window. May be captured.

        The plan must already count these tokens in all of its sequences; otherwise the last tokens of a
        sequence are overwritten.

        Args:
            keys: [B, Hkv, n, D], the last n of the tokens that the plan counts, the same n for all.
            values: [B, Hkv, n, Dv].
            plan: the sequences.
            layer: index of the layer.

        Raises:
            InvalidInputError: keys or values have the wrong shape.
        """
        tokens = keys.shape[2] if keys.dim() == 4 else 0
        self.check_states(keys, values, (plan.batch, self.size.kv_heads, tokens))
        at = plan.ends.unsqueeze(1) + torch.arange(-tokens, 0, device=self.device)
        at = at.clamp_min(0)  # of sequences without tokens
        index = plan.sequences[:, None, None], self._head[None, :, None], at[:, None]
        for side, states in ((self.keys, keys), (self.values, values)):
            side.window[layer][index] = states.to(self.dtype)

    @torch.no_grad()
    def attend(
        self,
        query: torch.Tensor,
        plan: PagedPlan,
        *,
        layer: int = 0,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of the last Tq tokens of each sequence over all its tokens. May be captured.

        Args:
            query: [B, Hq, Tq, D], post-RoPE; causal, aligned at the last token.
            plan: the sequences.
            layer: index of the layer.
            scaling: factor on q.k; None: 1 / sqrt(D).
            softcap: scores become softcap * tanh(score / softcap), or None.
            sinks: [Hq] learned logits that carry no value, or None.

        Returns:
            [B, Hq, Tq, Dv] in the query's dtype; zeros for a sequence without tokens.

        Raises:
            InvalidInputError: the query has the wrong shape, or more tokens than the plan accepts.
        """
        head_dim = self.keys.codec.head_dim
        if query.dim() != 4 or query.shape[0] != plan.batch or query.shape[3] != head_dim:
            wanted = f"[{plan.batch}, Hq, Tq, {head_dim}]"
            raise InvalidInputError(f"the query must be {wanted}, got {tuple(query.shape)}")
        if query.shape[2] > plan.most_queries:
            raise InvalidInputError(
                f"{query.shape[2]} query tokens reach back into packed pages, at most {plan.most_queries} do "
                "not; attend fewer at a time, or keep more recent_tokens"
            )
        segments = self.segments(plan, layer)
        visibility = Visibility(query.shape[2], sum(segment.tokens for segment in segments))
        scaling = head_dim**-0.5 if scaling is None else scaling
        return attend(
            query, segments, visibility, scaling=scaling, softcap=softcap, sinks=sinks, slots=plan.chosen
        )

    def segments(self, plan: PagedPlan, layer: int) -> list[Segment]:
        """What attention reads in one layer: sinks, pages by table, windows, with lengths on the device.

        16-bit tokens and transforms are those of all sequences; `plan.chosen` selects some.
        """
        keys, values = (self._packed(side, layer) for side in (self.keys, self.values))
        packed = PackedSegment(keys, values, plan.packed, plan.table, schedule=plan.schedule)
        newest = DenseSegment(self.keys.window[layer], self.values.window[layer], plan.window)
        if not self.settings.sink_tokens:
            return [packed, newest]
        first = DenseSegment(self.keys.sinks[layer], self.values.sinks[layer], plan.sinks)
        return [first, packed, newest]

    def _packed(self, side: PoolBuffers, layer: int) -> PackedSide:
        planes = {name: plane[layer] for name, plane in side.planes.items()}
        return PackedSide(side.codec, planes, side.transform(layer, None))
