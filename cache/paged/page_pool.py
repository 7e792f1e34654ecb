"""`PagePool`: the memory of paged attention and what happens in it, for an engine that manages blocks itself.

A *block* is room for a packed page of 128 tokens in every layer and KV head. A *slot* is what a sequence has
beside its blocks: 16-bit tokens, and the channel transforms that its pages were made with. Its tokens::

    [ sinks: first `sink_tokens`, 16 bits | whole pages, one block each | window: the newest, 16 bits ]

While a sequence has no page, all its tokens are in the window. Its first page takes the sinks out, and mean
key and channel weights are taken from what is packed then. Bits of different tokens share words, so a page
is written whole and never changes: sequences may share blocks, and no token is quantized twice.

The host says which slots and blocks; nothing here waits for the device, but for `fill` and `pack`, which look
for NaN and infinity.
"""

import sys

import torch

from quantpress.cache.paged.paged_plan import PagedPlan, paged_plan
from quantpress.cache.paged.pool_side import PoolSide
from quantpress.cache.paged.pool_storage import PoolStorage
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment, PackedSegment, PackedSide, Segment, Visibility, attend


class PagePool(PoolStorage):
    """Blocks and slots of a number of layers, and attention over them.

    Arguments and attributes are those of `PoolStorage`. The calls, in the order of a serving engine's step:
    `fill` for new prompts, `pack` for windows that would overflow, `plan`, and for every layer `write` and
    `attend`; the last three may be captured in a CUDA graph.
    """

    def plan(
        self,
        block_tables: torch.Tensor,
        context_lens: torch.Tensor,
        page_counts: torch.Tensor,
        slots: torch.Tensor | None = None,
        *,
        most_queries: int = sys.maxsize,
    ) -> PagedPlan:
        """What all layers of a step need to know. Runs on the device alone, so it may be captured.

        Args:
            block_tables: [B, P] int32, the blocks of each sequence; any block where it has none.
            context_lens: [B] int32, tokens of each sequence, those of this step included.
            page_counts: [B] int32, how many of them are in pages of 128.
            slots: [B] int64, the slot of each sequence; None: all slots in order.
            most_queries: query tokens of one call to accept: where a sequence has pages, all but the first
                query token must be in its window.

        Raises:
            InvalidInputError: a tensor has the wrong dtype or shape.
        """
        sinks = self.settings.sink_tokens
        if slots is None and block_tables.shape[0] != self.size.slots:
            raise InvalidInputError(
                f"block_tables have {block_tables.shape[0]} rows for {self.size.slots} slots; name the slots"
            )
        return paged_plan(block_tables, context_lens, page_counts, slots, self.size, sinks, most_queries)

    @torch.no_grad()
    def write(self, keys: torch.Tensor, values: torch.Tensor, plan: PagedPlan, *, layer: int = 0) -> None:
        """Put the newest tokens of every sequence of a plan into its window. May be captured.

        The plan must count them already, in every one of its sequences: one that does not would have its
        last tokens written over.

        Args:
            keys: [B, Hkv, n, D], the last n of the tokens that the plan counts, the same n for all.
            values: [B, Hkv, n, Dv].
            plan: whom they belong to.
            layer: which layer.

        Raises:
            InvalidInputError: wrong shapes.
        """
        tokens = keys.shape[2] if keys.dim() == 4 else 0
        self.check_states(keys, values, (plan.batch, self.size.kv_heads, tokens))
        place = plan.ends.unsqueeze(1) + torch.arange(-tokens, 0, device=self.device)
        place = place.clamp_min(0)  # of slots that nobody uses
        index = plan.slots[:, None, None], self._head[None, :, None], place[:, None]
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
            plan: which sequences.
            layer: which layer.
            scaling: factor on q.k; 1 / sqrt(D) when left out.
            softcap: scores become softcap * tanh(score / softcap), or None.
            sinks: [Hq] learned logits that carry no value, or None.

        Returns:
            [B, Hq, Tq, Dv] in the query's dtype; zeros for a sequence without tokens.

        Raises:
            InvalidInputError: the query does not fit, or has more tokens than the plan admits.
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

        16-bit tokens and transforms are those of every slot; `plan.chosen` says which of them are meant.
        """
        keys, values = (self._packed(side, layer) for side in (self.keys, self.values))
        packed = PackedSegment(keys, values, plan.packed, plan.table, shares=plan.shares)
        newest = DenseSegment(self.keys.window[layer], self.values.window[layer], plan.window)
        if not self.settings.sink_tokens:
            return [packed, newest]
        first = DenseSegment(self.keys.sinks[layer], self.values.sinks[layer], plan.sinks)
        return [first, packed, newest]

    def _packed(self, side: PoolSide, layer: int) -> PackedSide:
        planes = {name: plane[layer] for name, plane in side.planes.items()}
        return PackedSide(side.codec, planes, side.transform(layer, None))
