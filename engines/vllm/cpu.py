"""The backend of vLLM's CPU platform, which has one only: ours for our dtypes, its own for all others."""

from typing import Any

from quantpress.engines.vllm.dtypes import is_ours

STOCK = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


def __getattr__(name: str) -> Any:
    """`Backend`, looked up whenever vLLM chooses the backend of a layer."""
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from quantpress.engines.vllm.backend import QuantpressBackend

    config = get_current_vllm_config_or_none()
    if config is not None and is_ours(config.cache_config.cache_dtype):
        return QuantpressBackend
    return resolve_obj_by_qualname(STOCK)
