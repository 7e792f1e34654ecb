"""The tokens of one layer: packed blocks in vLLM's cache, and the recent pages and sink entries beside it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantpress.codecs.protocol import PageCodec
from quantpress.engines.vllm.block_state import Capacity
from quantpress.engines.vllm.page_layout import BlockPages, PageLayout
from quantpress.engines.vllm.step_plan import DecodePlan, PrefillPlan
from quantpress.kernels.attend import PackedSide
from quantpress.kernels.blocks import (
    BlockSide,
    TokenTarget,
    decode_blocks,
    encode_blocks,
    pack_blocks,
    put_tokens,
)
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.quantization.query_moments import QueryMoments
from quantpress.quantization.transform import ChannelTransform, key_statistics

LARGEST = 1e30
"""Coordinates of keys that are packed again; what is larger was no key."""

REPACKED_VALUES = 1 << 24
"""Coordinates of blocks that are packed again at a time."""


@dataclass(frozen=True)
class StoreSettings:
    """What a layer stores.

    Args:
        codecs: of keys and of values.
        kv_heads: Hkv, of this process.
        dtype: of the model's keys and values.
        sinks: first tokens of a request that are kept in 16 bits.
        capacity: of the pools.
        group: G, query heads for each KV head.
        scaling: factor on q.k.
    """

    codecs: tuple[PageCodec, PageCodec]
    kv_heads: int
    dtype: torch.dtype
    sinks: int
    capacity: Capacity
    group: int = 1
    scaling: float = 1.0

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.codecs, self.dtype)


class LayerStore:
    """Keys and values of one layer.

    Args:
        settings: what is stored.
        device: of all tensors.

    Attributes:
        recent: keys and values [pages, Hkv, 128, D] of recent pages.
        sinks: keys and values [entries + 1, Hkv, sinks, D] of sink entries.
        mean, weight: [1, Hkv, D] float32, statistics of keys, the same for all requests.
        queries: moments of queries times the scaling, which choose the sink of each block.
        ready: whether these statistics are final; before, means are 0, weights and variances 1.
    """

    def __init__(self, settings: StoreSettings, device: torch.device) -> None:
        self.settings, self.ready = settings, False
        self._pages: BlockPages | None = None
        heads, capacity = settings.kv_heads, settings.capacity
        dims = [codec.head_dim for codec in settings.codecs]

        def pools(count: int, tokens: int) -> tuple[Tensor, Tensor]:
            keys, values = (
                torch.zeros(count, heads, tokens, d, dtype=settings.dtype, device=device) for d in dims
            )
            return keys, values

        self.recent = pools(capacity.pages, PAGE_TOKENS)
        self.sinks = pools(capacity.entries + 1, settings.sinks)
        self.mean = torch.zeros(1, heads, dims[0], dtype=torch.float32, device=device)
        self.weight = torch.ones(1, heads, dims[0], dtype=torch.float32, device=device)
        of_queries = torch.zeros(heads, settings.group, dims[0], dtype=torch.float32, device=device)
        self.queries = QueryMoments(of_queries, torch.ones_like(of_queries))

    def use(self, codecs: tuple[PageCodec, PageCodec]) -> None:
        """Store pages of these codecs, of the same dimensions; before `bind`."""
        self.settings = replace(self.settings, codecs=codecs)

    def bind(self, cache: Tensor) -> None:
        """Use this layer's part of vLLM's cache, [blocks, Hkv, 128, C] uint8.

        Raises:
            InvalidInputError: pages do not lie in it in one piece each.
        """
        if (
            self._pages is not None
            and self._pages.cache.data_ptr() == cache.data_ptr()
            and self._pages.cache.shape == cache.shape
        ):
            return
        pages = BlockPages(self.settings.layout, cache)
        key_codec, value_codec = self.settings.codecs
        key_transform, value_transform = self.transforms
        keys, values = pages.pool()
        self.pool = (
            PackedSide(key_codec, keys, key_transform),
            PackedSide(value_codec, values, value_transform),
        )
        keys, values = pages.by_head()
        self.blocks = (
            BlockSide(key_codec, key_transform, keys, self.queries),
            BlockSide(value_codec, value_transform, values),
        )
        self._pages = pages
        if cache.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._warm_up()

    def _warm_up(self) -> None:
        """Compile the kernels of prompts now, so that the first request does not wait for them."""
        nothing = torch.full((1,), -1, dtype=torch.int32, device=self.mean.device)
        states = [pool.new_zeros(PAGE_TOKENS, pool.shape[1], pool.shape[3]) for pool in self.recent]
        keys, values = (_from_each_token(x) for x in states)
        pack_blocks(keys, values, nothing, nothing, self.blocks)
        self._pack_recent(nothing, nothing)
        for side in self.blocks:
            decode_blocks(side, nothing.clamp(min=0), self.settings.dtype)

    @property
    def transforms(self) -> tuple[ChannelTransform, ChannelTransform]:
        """Of keys and of values; parts [1, Hkv, D] hold for every request."""
        if not self.settings.codecs[0].wants_statistics:
            return ChannelTransform(), ChannelTransform()
        return ChannelTransform(self.mean, self.weight), ChannelTransform()

    def write_decodes(self, keys: Tensor, values: Tensor, plan: DecodePlan) -> None:
        """Store new tokens of decodes, keys [T, Hkv, D] and values [T, Hkv, Dv]; pack blocks they fill."""
        tokens = len(plan.recent_rows)
        self._put(keys[:tokens], values[:tokens], plan.recent_rows, plan.sink_rows)
        self._pack_recent(plan.full_pages, plan.full_blocks)

    def write_prefills(self, keys: Tensor, values: Tensor, plan: PrefillPlan) -> None:
        """Store tokens of prefills, keys [Tp, Hkv, D] and values [Tp, Hkv, Dv]; pack blocks they fill.

        Recent pages of partly filled blocks may be lost; `unfilled` copies them.
        """
        self._put(keys, values, plan.early_rows, plan.sink_rows)
        if len(plan.resumed_pages):
            self._pack_recent(plan.resumed_pages, plan.resumed_blocks)
        if len(plan.whole_tokens):
            key_pages, value_pages = _from_each_token(keys), _from_each_token(values)
            pack_blocks(key_pages, value_pages, plan.whole_tokens, plan.whole_blocks, self.blocks)
        self._put(keys, values, plan.late_rows, None)

    def unfilled(self, plan: PrefillPlan) -> list[tuple[Tensor, Tensor] | None]:
        """Copies of the recent pages of partly filled blocks, by request: [1, Hkv, 128, D] each."""
        copies: list[tuple[Tensor, Tensor] | None] = []
        for request in plan.requests:
            page = request.recent_page
            keys, values = self.recent
            copies.append(
                None if page is None else (keys.index_select(0, page), values.index_select(0, page))
            )
        return copies

    def _put(self, keys: Tensor, values: Tensor, recent: Tensor, sinks: Tensor | None) -> None:
        targets = [TokenTarget(recent, *self.recent)]
        if sinks is not None and self.settings.sinks:
            targets.append(TokenTarget(sinks, *self.sinks))
        put_tokens(keys, values, targets)

    def _pack_recent(self, pages: Tensor, blocks: Tensor) -> None:
        pack_blocks(*self.recent, pages, blocks, self.blocks)

    def set_statistics(self, transform: ChannelTransform, queries: QueryMoments | None = None) -> None:
        """Use these statistics for all requests.

        Args:
            transform: of keys, mean and weight [1, Hkv, D], or None for 0 and 1.
            queries: moments of the queries; None: a block's sink is its longest key.
        """
        if queries is not None:
            scaled = queries.scaled(self.settings.scaling)
            self.queries.mean.copy_(scaled.mean)
            self.queries.variance.copy_(scaled.variance)
        if transform.mean is not None:
            self.mean.copy_(transform.mean)
        if transform.weight is not None:
            self.weight.copy_(transform.weight)
        self.ready = True

    def freeze(self, keys: Tensor, queries: Tensor, packed: bool) -> None:
        """Take the statistics from a piece of a prompt, and pack again what was packed without.

        Args:
            keys: [m, Hkv, D].
            queries: [m, Hq, D].
            packed: whether blocks may have been packed before.
        """
        heads = self.settings.kv_heads
        own = queries.float().unflatten(1, (heads, -1))  # [m, Hkv, G, D]
        moments = QueryMoments(own.mean(0), own.var(0, correction=0))
        moment = own.square().mean((0, 2))
        states = keys.transpose(0, 1).unsqueeze(0)
        groups = self.settings.codecs[0].groups
        found = key_statistics(states, moment.unsqueeze(0), groups)
        old = ChannelTransform(self.mean.clone(), self.weight.clone())
        self.set_statistics(found, moments)
        if packed:
            self._pack_again(old)

    def _pack_again(self, old: ChannelTransform) -> None:
        """Decode the keys of all blocks by the statistics `old`, and encode them by the present ones."""
        side, dtype = self.blocks[0], self.settings.dtype
        blocks = next(iter(side.planes.values())).shape[1]
        step = max(1, REPACKED_VALUES // (self.settings.kv_heads * PAGE_TOKENS * side.codec.head_dim))
        for start in range(0, blocks, step):
            part = {name: plane[:, start : start + step] for name, plane in side.planes.items()}
            keys = side.codec.decode({name: plane.unsqueeze(0) for name, plane in part.items()}, old, dtype)
            keys.nan_to_num_(0.0, 0.0, 0.0).clamp_(-LARGEST, LARGEST)  # of blocks that nobody has written
            for name, plane in encode_blocks(keys, side).items():
                part[name].copy_(plane[0])


def _from_each_token(states: Tensor) -> Tensor:
    """[T, Hkv, D] as pages [T - 127, Hkv, 128, D]: page t begins with token t."""
    token, head, channel = states.stride()
    shape = (states.shape[0] - PAGE_TOKENS + 1, states.shape[1], PAGE_TOKENS, states.shape[2])
    return states.as_strided(shape, (token, head, token, channel), states.storage_offset())
