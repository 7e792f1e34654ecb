"""The classes that vLLM asks an attention backend for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from quantpress.cache.saved.model_profile import ModelProfile
from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.engines.vllm import BACKEND
from quantpress.engines.vllm.attention import Scores
from quantpress.engines.vllm.block_state import BlockState, Capacity
from quantpress.engines.vllm.checks import check_engine, check_layer, warn_of_recent_pages
from quantpress.engines.vllm.dtypes import codecs_of, dtype_names
from quantpress.engines.vllm.layer_store import LayerStore, StoreSettings
from quantpress.engines.vllm.options import options_of
from quantpress.engines.vllm.page_layout import PageLayout
from quantpress.engines.vllm.prompts import run_step
from quantpress.engines.vllm.step_plan import PrefillPlan, StepBatch, StepPlan, StepPlanner
from quantpress.errors import InvalidInputError, NonFiniteError
from quantpress.kernels.layout import PAGE_TOKENS

FREEZING_TOKENS = 1024
"""Tokens of a piece of a prompt from which statistics of keys are taken, without a profile."""

_packing: tuple[str, torch.dtype] | None = None
"""KV-cache dtype and dtype of the model that was loaded last: its cache is sized without a configuration."""


class QuantpressBackend(AttentionBackend):
    """Attention over packed blocks."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type["QuantpressImpl"]:
        return QuantpressImpl

    @staticmethod
    def get_builder_cls() -> type["QuantpressBuilder"]:
        return QuantpressBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [PAGE_TOKENS]

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype in dtype_names()

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True  # so that `check_layer` can say why not, and what to do

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LHBNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        config = get_current_vllm_config_or_none()
        known = _packing if config is None else (config.cache_config.cache_dtype, config.model_config.dtype)
        if known is None or known[0] not in dtype_names() or spec.dtype != torch.uint8:
            return spec
        layout = PageLayout(codecs_of(known[0], spec.head_size, spec.head_size_v, known[1]), known[1])
        return replace(spec, state_content_bytes=layout.token_bytes)


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
    """Makes the plan of each step, for the layers of one group."""

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

    def _plan(self, batch: StepBatch) -> StepPlan:
        if self._planner is None:
            capacity = _capacity(self.vllm_config)
            blocks = self.vllm_config.cache_config.num_gpu_blocks
            state = BlockState(blocks, capacity, DEFAULT_SINK_TOKENS, self.device)
            pages = batch.block_table.shape[1]
            self._planner = StepPlanner(state, self.kv_cache_spec.num_kv_heads, pages)
        return self._planner.plan(batch)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> QuantpressMetadata:
        c = common_attn_metadata
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


def _padded(numbers: Sequence[int], count: int, fill: int = 0) -> list[int]:
    return [*numbers[:count], *[fill] * (count - len(numbers))]


def _uniform(counts: list[int], queries: int) -> bool:
    """Whether all requests have so many tokens, but for some at the end that are padding and have none."""
    real = sum(count > 0 for count in counts)
    return all(count == queries for count in counts[:real])


def _capacity(config: VllmConfig) -> Capacity:
    requests = config.scheduler_config.max_num_seqs
    return Capacity(requests, options_of(config.additional_config, requests).entries(requests))


class QuantpressImpl(AttentionImpl[QuantpressMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        global _packing
        config, dtype = get_current_vllm_config(), torch.get_default_dtype()
        on_gpu = not current_platform.is_cpu()
        check_engine(config, on_gpu)
        check_layer(
            head_dim=head_size,
            sliding_window=sliding_window,
            alibi_slopes=alibi_slopes,
            attn_type=attn_type,
            shared_with=kv_sharing_target_layer_name,
            others=others,
            on_gpu=on_gpu,
        )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.config = config
        self.scores = Scores(self.scale, logits_soft_cap or None)
        codecs = codecs_of(kv_cache_dtype, head_size, head_size, dtype)
        settings = StoreSettings(
            codecs,
            self.num_kv_heads,
            dtype,
            DEFAULT_SINK_TOKENS,
            _capacity(config),
            group=num_heads // self.num_kv_heads,
            scaling=self.scale,
        )
        self.store = LayerStore(settings, torch.device(current_platform.device_type))
        self._named = False
        _packing = (kv_cache_dtype, dtype)
        if on_gpu:
            warn_of_recent_pages(config, self.store)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: QuantpressMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise InvalidInputError(
                "quantpress does not quantize outputs; turn vLLM's fusion of attention and quantization off"
            )
        if not self._named:  # the first call, when vLLM measures memory
            self._read_profile(layer)
        if attn_metadata is None:
            return output.fill_(0)
        plan, store = attn_metadata.plan, self.store
        store.bind(kv_cache)
        if plan.prefills is not None and not store.ready:
            self._freeze(plan.prefills, key, query, plan.packed)
        run_step(store, plan, (query, key, value), self.scores, output, attn_metadata.tokens)
        return output

    def _read_profile(self, layer: Any) -> None:
        """Take the layer's statistics from the profile, if there is one."""
        self._named = True
        profile = None if getattr(layer, "is_draft_layer", False) else profile_of(self.config)
        if profile is not None:
            heads = _own_heads(self.config, self.num_kv_heads)
            index = extract_layer_index(layer.layer_name)
            group = _own_group(self.config, self.store.settings.group)
            moments = profile.query_moments(index, heads, group)
            self.store.set_statistics(profile.transform(index, heads), moments)

    def _freeze(self, plan: PrefillPlan, keys: Tensor, queries: Tensor, packed: bool) -> None:
        """Take the statistics from a long piece of a prompt, if the step has one."""
        for request in plan.requests:
            first = DEFAULT_SINK_TOKENS if request.before == 0 else 0
            part = slice(request.begin + first, request.begin + request.tokens)
            if request.tokens >= FREEZING_TOKENS:
                try:
                    self.store.freeze(keys[part], queries[part], packed)
                except NonFiniteError:  # the model overflows; vLLM goes on, and so do we
                    continue
                return


def _own_heads(config: VllmConfig, heads: int) -> slice:
    """KV heads of this rank among those of the model."""
    total, ranks = config.model_config.get_total_num_kv_heads(), config.parallel_config.tensor_parallel_size
    rank = get_tensor_model_parallel_rank()
    first = rank * heads if total >= ranks else rank * total // ranks
    return slice(first, first + heads)


def _own_group(config: VllmConfig, group: int) -> slice:
    """Query heads of this rank among those of its KV head, which several ranks may hold."""
    total, ranks = config.model_config.get_total_num_kv_heads(), config.parallel_config.tensor_parallel_size
    first = get_tensor_model_parallel_rank() % max(1, ranks // total) * group
    return slice(first, first + group)


def profile_of(config: VllmConfig) -> ModelProfile | None:
    """The model's profile that the user names, or None.

    Raises:
        CacheFileError: the file is no profile, or one of another model.
        InvalidInputError: an option is unknown, or its value makes no sense.
    """
    options = options_of(config.additional_config, config.scheduler_config.max_num_seqs)
    if options.profile is None:
        return None
    profile = _loaded(options.profile)
    profile.check(config.model_config.hf_text_config)
    return profile


@lru_cache(maxsize=2)
def _loaded(path: str) -> ModelProfile:
    return ModelProfile.load(path)
