"""What the plugin refuses when the engine starts: the reason, and what to use instead."""

from typing import Any

import torch

from quantpress.cache.engine_memory import why_not_head_dim
from quantpress.errors import UnsupportedModelError
from quantpress.kernels.layout import PAGE_TOKENS

MOST_RECENT = 0.1
"""Part of the GPU that recent pages may take without a warning."""

_INSTEAD = "use --kv-cache-dtype auto or fp8 without --attention-backend QUANTPRESS"


def check_layer(
    *,
    head_dim: int,
    sliding_window: int | None,
    alibi_slopes: Any,
    attn_type: str,
    shared_with: str | None,
    others: dict[str, Any],
    on_gpu: bool,
) -> None:
    """Check one attention layer.

    Args:
        head_dim: D.
        sliding_window: tokens that the layer sees, or None for all.
        alibi_slopes: of the layer, or None.
        attn_type: "decoder" or another of vLLM's kinds.
        shared_with: name of the layer whose cache this one reads, or None.
        others: further arguments of the layer; those that are set must be known here.
        on_gpu: whether the layer will run on a GPU.

    Raises:
        UnsupportedModelError: the plugin would not compute this layer's attention.
    """
    if attn_type != "decoder":
        _refuse(f"attention of type {attn_type!r}: only attention of a decoder over its own tokens is packed")
    if sliding_window is not None and sliding_window > 0:
        _refuse(
            f"a sliding window of {sliding_window} tokens: a block that has left it is not ours to keep",
            f"serve with --disable-sliding-window if no request is longer than that, or {_INSTEAD}",
        )
    if alibi_slopes is not None:
        _refuse("ALiBi: its scores depend on the distance of tokens, and packed tokens have no position")
    if shared_with is not None:
        _refuse(f"a layer that reads the cache of {shared_with}")
    if on_gpu and (reason := why_not_head_dim(head_dim)):
        _refuse(f"a head_dim of {head_dim}: {reason}")
    unknown = sorted(name for name, value in others.items() if value is not None and value is not False)
    if unknown:
        _refuse(f"attention with {', '.join(unknown)}")


def check_engine(config: Any, on_gpu: bool) -> None:
    """Check vLLM's configuration.

    Args:
        config: a `VllmConfig`.
        on_gpu: whether the engine runs on a GPU.

    Raises:
        UnsupportedModelError: the engine would answer wrongly, or not at all.
    """
    parallel, model = config.parallel_config, config.model_config
    if model is not None and model.use_mla:
        _refuse("MLA (multi-head latent attention): its cache holds latents, not keys and values")
    if model is not None and model.is_hybrid:
        _refuse("a model that mixes attention with recurrent layers: vLLM pads their blocks to one size")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        _refuse("context parallelism, which splits a block between GPUs", "use tensor parallelism instead")
    if config.kv_transfer_config is not None:
        _refuse(
            "a KV connector (disaggregated prefill, offloading), whose blocks come without their sinks",
            "serve without --kv-transfer-config and --kv-offloading-size",
        )
    if parallel.use_ubatching:
        _refuse("microbatches, which plan two steps at a time", "serve without --enable-dbo")
    block = config.cache_config.block_size
    if config.cache_config.user_specified_block_size and block != PAGE_TOKENS:
        _refuse(f"blocks of {block} tokens", f"leave --block-size out, or set it to {PAGE_TOKENS}")
    if on_gpu and not config.use_v2_model_runner:
        _refuse(
            "vLLM's first model runner, which does not tell which request a token belongs to",
            "leave out VLLM_USE_V2_MODEL_RUNNER=0 and the feature that vLLM names in its log",
        )


def _refuse(what: str, instead: str = _INSTEAD) -> None:
    raise UnsupportedModelError(f"quantpress does not pack {what}; {instead}")


def warn_of_recent_pages(config: Any, store: Any) -> None:
    """Say once if the newest tokens of all requests together take much of the GPU.

    Args:
        config: a `VllmConfig`.
        store: the `LayerStore` of one layer.
    """
    layers = config.model_config.get_num_layers(config.parallel_config)
    taken = layers * sum(pool.nbytes for pool in store.recent)
    whole = torch.cuda.get_device_properties(store.mean.device).total_memory
    if taken > MOST_RECENT * whole:
        requests = config.scheduler_config.max_num_seqs
        from vllm.logger import init_logger

        init_logger(__name__).warning_once(
            "quantpress keeps the newest tokens of each request in 16 bits: %.1f GB for the %d requests that "
            "may run at a time. If fewer will, set --max-num-seqs; what is saved holds packed tokens.",
            taken / 1e9,
            requests,
        )
