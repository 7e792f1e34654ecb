"""Caches of packed layers for the tests of this folder."""

from typing import Any

from transformers import DynamicCache, PreTrainedModel

from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings
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


def packed_cache(model: PreTrainedModel, settings: LayerSettings) -> DynamicCache:
    """A cache whose full-attention layers are packed ones, from the first token on."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if not layer.is_sliding:
            cache.layers[index] = PackedLayer(settings)
    return cache
