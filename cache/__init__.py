"""Storage: packed cache layers, their attention, their bytes."""

from quantpress.cache.attention.dispatch import install_packed_attention, uninstall_packed_attention
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.continuation import continue_inputs
from quantpress.cache.layer import LayerSnapshot, PackedLayer
from quantpress.cache.memory import CacheMemory, LayerMemory, cache_memory
from quantpress.cache.paged.attention import PagedAttention
from quantpress.cache.paged.buffers import PoolSize
from quantpress.cache.paged.memory import PagedMemory
from quantpress.cache.paged.plan import PagedPlan
from quantpress.cache.paged.pool import PagePool
from quantpress.cache.saved.model_profile import ModelProfile
from quantpress.cache.saved.width_plan import WidthPlan
from quantpress.cache.settings import LayerSettings
from quantpress.cache.text_cache import TextCache
from quantpress.cache.tokens.packed_tokens import PackedTokens

__all__ = [
    "CacheMemory",
    "LayerMemory",
    "LayerSettings",
    "LayerSnapshot",
    "ModelProfile",
    "PackedLayer",
    "PackedStates",
    "PackedTokens",
    "PagePool",
    "PagedAttention",
    "PagedMemory",
    "PagedPlan",
    "PoolSize",
    "TextCache",
    "WidthPlan",
    "cache_memory",
    "continue_inputs",
    "install_packed_attention",
    "uninstall_packed_attention",
]
