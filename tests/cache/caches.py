"""Caches of packed layers for the tests of this folder."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache.attention.dispatch import PACKED_ATTENTION
from quantpress.cache.attention.functions import TORCH_ATTENTION
from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.head_groups import by_head
from quantpress.codecs.raw import RawPages
from quantpress.codecs.scalar import ScalarPages
from quantpress.quantization.spec import CodecSpec


def lossless(head_dim: int = 32, **windows: int) -> LayerSettings:
    """Settings whose pages store every value unchanged."""
    return LayerSettings(RawPages(head_dim, 32), RawPages(head_dim, 32), **windows)


def scalar(head_dim: int = 32, bits: float = 4, **options: Any) -> LayerSettings:
    """TurboQuant pages of `bits` for keys and values."""
    keys, values = (
        ScalarPages(CodecSpec(head_dim=head_dim, bits=bits, role=role)) for role in ("key", "value")
    )
    return LayerSettings(keys, values, **options)


def grouped(head_dim: int = 32, **options: Any) -> LayerSettings:
    """TurboQuant pages of other widths in each of two heads: keys 2 and 3 bits, values 4 and 1."""
    keys, values = (
        [ScalarPages(CodecSpec(head_dim, bits, role)) for bits in widths]
        for role, widths in (("key", (2, 3)), ("value", (4, 1)))
    )
    return LayerSettings(*by_head(keys, values), **options)


def packed_cache(model: PreTrainedModel, settings: LayerSettings) -> DynamicCache:
    """A cache whose full-attention layers are packed ones, from the first token on."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if not layer.is_sliding:
            cache.layers[index] = PackedLayer(settings)
    return cache


def functions() -> dict[str, Any]:
    """Every attention function by name: those in transformers' table, and torch's own."""
    return {**ALL_ATTENTION_FUNCTIONS, TORCH_ATTENTION: F.scaled_dot_product_attention}


@contextmanager
def functions_left_alone() -> Iterator[dict[str, Any]]:
    """After the block, there are the same names and the same objects as before; these are what it gives."""
    if PACKED_ATTENTION.users:
        gc.collect()  # takes as long as most of these tests, so only where something is left to find
    before = functions()
    assert not PACKED_ATTENTION.users, "an earlier test keeps a packed layer"
    yield before
    if functions() != before:
        gc.collect()
    assert functions() == before
