"""The classes that vLLM asks an attention backend for."""

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from quantpress.cache.engine_memory import planned_widths
from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.engines.vllm import BACKEND
from quantpress.engines.vllm.attention import Scores
from quantpress.engines.vllm.builder import QuantpressBuilder, QuantpressMetadata, capacity_of
from quantpress.engines.vllm.checks import check_engine, check_layer, warn_of_recent_pages
from quantpress.engines.vllm.dtypes import codecs_of, dtype_names
from quantpress.engines.vllm.layer_store import LayerStore, StoreSettings
from quantpress.engines.vllm.model_files import plan_of, profile_of
from quantpress.engines.vllm.page_layout import PageLayout
from quantpress.engines.vllm.prompts import run_step
from quantpress.engines.vllm.step_plan import PrefillPlan
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
    widths: ClassVar[tuple[int, int] | None] = None
    """Bits of keys and of values of the layers with this backend; None: those of the KV-cache dtype."""

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
        return KVCacheLayout.LHBNC, KVCacheLayout.LBHNC  # vLLM takes the first that all layers fit in

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        config = get_current_vllm_config_or_none()
        known = _packing if config is None else (config.cache_config.cache_dtype, config.model_config.dtype)
        if known is None or known[0] not in dtype_names() or spec.dtype != torch.uint8:
            return spec
        codecs = codecs_of(known[0], spec.head_size, spec.head_size_v, known[1], cls.widths)
        return replace(spec, state_content_bytes=PageLayout(codecs, known[1]).token_bytes)

    @classmethod
    @cache
    def with_widths(cls, keys: int, values: int) -> type["QuantpressBackend"]:
        """The backend of layers with these widths: vLLM asks a layer's backend how large its pages are."""
        name = f"{QuantpressBackend.__name__}K{keys}V{values}"
        return type(name, (QuantpressBackend,), {"widths": (keys, values), "__module__": __name__})


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
        self.config, self.plan = config, plan_of(config)
        self.scores = Scores(self.scale, logits_soft_cap or None)
        codecs = codecs_of(kv_cache_dtype, head_size, head_size, dtype)
        settings = StoreSettings(
            codecs,
            self.num_kv_heads,
            dtype,
            DEFAULT_SINK_TOKENS,
            capacity_of(config),
            group=num_heads // self.num_kv_heads,
            scaling=self.scale,
        )
        self.store = LayerStore(settings, torch.device(current_platform.device_type))
        self._named = False
        _packing = (kv_cache_dtype, dtype)
        if on_gpu:
            warn_of_recent_pages(config, self.store)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take this layer's widths from the plan, if there is one: vLLM has named all layers now.

        A layer that the plan does not have is not the model's, but one of a draft inside it.
        """
        if self.plan is None:
            return
        layers = self.config.compilation_config.static_forward_context.items()
        for name, layer in (one for one in layers if getattr(one[1], "impl", None) is self):
            index = extract_layer_index(name)
            if index in self.plan.widths:
                (widths,) = planned_widths(self.plan, [index])
                size, dtype = self.head_size, self.store.settings.dtype
                self.store.use(codecs_of(self.kv_cache_dtype, size, size, dtype, widths))
                layer.attn_backend = QuantpressBackend.with_widths(*widths)

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
