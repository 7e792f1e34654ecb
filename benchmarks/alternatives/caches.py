"""Packages with a cache of transformers' kind: `update` gives keys and values, torch attends to them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .calls import Attention, sdpa

CHUNK = 4096
"""Tokens of an update where quantizing takes 1 KB of work space for every number (tqai, 8 bits)."""

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def appended(update: Callable[..., Any], held: object, states: States, name: str = "") -> Attention:
    """`update` with one more token, the first again, then torch's attention over what it returns."""
    keys, values, query = states

    def call() -> torch.Tensor:
        return sdpa(query, *update(keys[:, :, :1], values[:, :, :1]))

    return Attention({name: call}, held, appends=True)


def turboquant_vllm(bits: int, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """`CompressedDynamicCache` as it comes: compressed tensors, and beside them all tokens in 16 bits."""
    from transformers import DynamicCache
    from turboquant_vllm import CompressedDynamicCache

    inner = DynamicCache()
    cache = CompressedDynamicCache(inner, head_dim=keys.shape[3], bits=bits)
    inner.update(keys, values, 0)
    held = [*cache.get_compressed(0), inner.layers[0].keys, inner.layers[0].values]
    return appended(lambda *new: inner.update(*new, 0), held, (keys, values, query))


def tqai(
    setting: tuple[str, int], keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor
) -> Attention:
    """`TurboQuantDynamicCache`: "auto" keeps no codes, but what they decode to; "full" decodes all."""
    from tqai import TurboQuantConfig
    from tqai.cache.hf import TurboQuantDynamicCache

    strategy, bits = setting
    config = TurboQuantConfig(bits_k=bits, bits_v=bits, device=str(keys.device), cache_strategy=strategy)
    cache = TurboQuantDynamicCache(config)
    step = keys.shape[2] if strategy == "full" else CHUNK
    for part in zip(keys.split(step, 2), values.split(step, 2), strict=True):
        cache.update(*part, 0)
    held = [cache._compressed_keys, cache._compressed_values, cache._k_buffers, cache._v_buffers]
    return appended(lambda *new: cache.update(*new, 0), held, (keys, values, query))


def turboquant(bits: int, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """`TurboQuantCache`: a byte a number and float32 norms, decoded as a whole at every token."""
    import numpy as np

    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # it takes any numpy from 1.24, and calls what 2.4 took out
    from turboquant import TurboQuantCache

    cache = TurboQuantCache(bits=bits)
    cache.update(keys, values, 0)
    return appended(lambda *new: cache.update(*new, 0), vars(cache.layers[0]), (keys, values, query))


def quanto(bits: int, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> Attention:
    """One layer of transformers' QuantizedCache with quanto: every call decodes the layer as a whole.

    On CUDA quanto unpacks by an extension that it compiles at first use, for minutes. It is taken where it is
    built; elsewhere PyTorch does the same in two steps and a concatenation.
    """
    from transformers.cache_utils import QuantoQuantizedLayer

    name = ""
    if keys.is_cuda:
        from optimum.quanto.library.extensions import get_extension

        extension, name = get_extension("quanto_cuda"), "its extension"
        if not list(Path(extension.build_directory).glob("*.so")):
            extension._lib = SimpleNamespace(unpack=lambda codes, width: torch.cat([codes & 15, codes >> 4]))
            name = "unpacked by PyTorch"
    layer = QuantoQuantizedLayer(nbits=bits)
    layer.update(keys, values)
    return appended(layer.update, vars(layer), (keys, values, query), name)
