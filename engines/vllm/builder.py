"""Makes the plan of each step from what vLLM tells of its requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.engines.vllm.block_state import BlockState, Capacity
from quantpress.engines.vllm.checks import check_engine
from quantpress.engines.vllm.model_files import profile_of
from quantpress.engines.vllm.options import options_of
from quantpress.engines.vllm.page_layout import row_steps
from quantpress.engines.vllm.step_plan import StepBatch, StepPlan, StepPlanner


@dataclass
class QuantpressMetadata(AttentionMetadata):
    """What the layers of a step need.

    Args:
        plan: what is written and read.
        tokens: of the batch, without padding behind prefills.
    """

    plan: StepPlan
    tokens: int


class QuantpressBuilder(AttentionMetadataBuilder[QuantpressMetadata]):
    """Makes the plan of each step, for the layers of one group.

    Layers with pages of another size are another group, with a builder of its own, but of the same blocks.
    So the first builder that is asked for a step makes the plan, and the others take it.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        check_engine(vllm_config, device.type != "cpu")
        profile_of(vllm_config)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._planner: StepPlanner | None = None
        self._made: QuantpressMetadata | None = None
        self._made_of: ReferenceType[CommonAttentionMetadata] | None = None
        self._takers: WeakSet[QuantpressBuilder] = WeakSet()

    def _plan(self, batch: StepBatch) -> StepPlan:
        if self._planner is None:
            capacity = capacity_of(self.vllm_config)
            blocks = self.vllm_config.cache_config.num_gpu_blocks
            state = BlockState(blocks, capacity, DEFAULT_SINK_TOKENS, self.device)
            pages = batch.block_table.shape[1]
            heads, layout = self.kv_cache_spec.num_kv_heads, self.vllm_config.cache_config.kv_cache_layout
            steps = row_steps(layout == KVCacheLayout.LBHNC.name, blocks, heads)
            self._planner = StepPlanner(state, heads, pages, steps)
        return self._planner.plan(batch)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> QuantpressMetadata:
        global _last
        c = common_attn_metadata
        made = self._made_by_another(c)
        if made is None:
            made = self._made = self._make(c)
            self._made_of, self._takers, _last = ref(c), WeakSet(), ref(self)
        return made

    def _made_by_another(self, c: CommonAttentionMetadata) -> QuantpressMetadata | None:
        """What another builder has made for this step, once: vLLM may change `c` and ask again."""
        other = None if _last is None else _last()
        if other is None or other is self or self in other._takers:
            return None
        if other._made_of is None or other._made_of() is not c or self._planner not in (None, other._planner):
            return None
        if other.kv_cache_spec.num_kv_heads != self.kv_cache_spec.num_kv_heads:
            return None
        other._takers.add(self)
        self._planner = other._planner
        return other._made

    def _make(self, c: CommonAttentionMetadata) -> QuantpressMetadata:
        threshold = self.reorder_batch_threshold or 1
        decodes, prefills, tokens, _ = split_decodes_and_prefills(c, decode_threshold=threshold)
        starts = c.query_start_loc_cpu[: c.num_reqs + 1].tolist()
        counts = [end - start for start, end in pairwise(starts)][:decodes]
        queries = max(counts, default=1) or 1
        if not prefills and tokens > starts[-1]:  # a graph's padding: its requests have as many tokens each
            queries = tokens // decodes
        lengths = c.seq_lens_cpu_upper_bound
        if lengths is None or self.device.type == "cpu" or (c.req_idx is None and c.max_query_len > 1):
            lengths = c.seq_lens  # the bound is not kept where a draft model reads a prompt
        batch = StepBatch(
            starts=c.query_start_loc[: c.num_reqs + 1],
            lengths=c.seq_lens[: c.num_reqs],
            block_table=c.block_table_tensor[: c.num_reqs],
            slots=self._slots_in(c),
            decodes=decodes,
            queries=queries,
            host_starts=starts,
            host_lengths=_padded(lengths.tolist(), c.num_reqs),
            uniform=_uniform(counts, queries),
        )
        return QuantpressMetadata(self._plan(batch), c.num_actual_tokens)

    def _slots_in(self, c: CommonAttentionMetadata) -> Tensor | None:
        """The row of each request among vLLM's running requests; padding gets a row of its own."""
        nobody = self.vllm_config.scheduler_config.max_num_seqs
        if c.req_idx is not None:
            rows = np.full(c.num_reqs, nobody, dtype=np.int64)
            given = c.req_idx[: c.num_reqs]
            rows[: len(given)] = np.where(given < 0, nobody, given)
            _slots.rows = rows
        elif self.device.type == "cpu":
            return None
        else:  # a step of the draft model, for the requests of the step before it
            rows = np.array(_padded(_slots.rows.tolist(), c.num_reqs, nobody), dtype=np.int64)
        return torch.from_numpy(rows).pin_memory().to(self.device, non_blocking=True)


@dataclass
class _Slots:
    """Rows of the requests of the last step that said so."""

    rows: np.ndarray[Any, Any]


_slots = _Slots(np.empty(0, dtype=np.int64))

_last: ReferenceType[QuantpressBuilder] | None = None
"""The builder that has made the last plan."""


def _padded(numbers: Sequence[int], count: int, fill: int = 0) -> list[int]:
    return [*numbers[:count], *[fill] * (count - len(numbers))]


def _uniform(counts: list[int], queries: int) -> bool:
    """Whether all requests have so many tokens, but for some at the end that are padding and have none."""
    real = sum(count > 0 for count in counts)
    return all(count == queries for count in counts[:real])


def capacity_of(config: VllmConfig) -> Capacity:
    """Sizes of the pools of tokens in 16 bits."""
    requests = config.scheduler_config.max_num_seqs
    return Capacity(requests, options_of(config.additional_config, requests).entries(requests))
