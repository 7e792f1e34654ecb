"""Layers of a cache to parts and back: packed layers, and plain and sliding-window ones of transformers."""

from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from quantpress.cache import host
from quantpress.cache.fixed.plain import BufferedLayer
from quantpress.cache.layer import PackedLayer
from quantpress.cache.saved.checks import check_tokens
from quantpress.cache.saved.states import placeholder_parts, state_parts
from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.demotion import DemotedPages
from quantpress.cache.tokens.packed_tokens import PackedTokens
from quantpress.codecs.parts import Parts, rebuild, register_maker
from quantpress.codecs.protocol import codec_of
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend import DenseSegment
from quantpress.quantization.transform import ChannelTransform

_OPTIONS = ("sink_tokens", "recent_tokens", "mean_key", "balance")
_SIDES = ("key", "value")
_PAGES = ("even_pages", "ragged_pages")


def cache_parts(cache: Cache) -> Parts:
    """The parts of a cache. Tensors are not copied.

    Raises:
        InvalidInputError: a layer, or its codec, cannot be saved.
    """
    return Parts(
        "cache", inner={str(index): _layer_parts(index, one) for index, one in enumerate(cache.layers)}
    )


def cache_of(parts: Parts) -> DynamicCache:
    """The cache that `cache_parts` describes, over the tensors of `parts`.

    Raises:
        InvalidInputError: the parts do not fit together.
    """
    cache = DynamicCache()
    cache.layers = [rebuild(parts.inner[str(index)]) for index in range(len(parts.inner))]
    return cache


def _layer_parts(index: int, layer: Any) -> Parts:
    if isinstance(layer, host.LINEAR_LAYER):
        return state_parts(index, layer, _token_parts(index, layer) if host.keeps_tokens(layer) else None)
    return placeholder_parts(layer) or _token_parts(index, layer)


def _token_parts(index: int, layer: Any) -> Parts:
    if isinstance(layer, PackedLayer):
        return _packed_layer_parts(layer)
    tensors = {} if layer.get_seq_length() == 0 else {"keys": layer.keys, "values": layer.values}
    kind = layer.plain if isinstance(layer, BufferedLayer) else type(layer)
    if kind in (DynamicLayer, host.FULL_AND_LINEAR_LAYER):
        return Parts("dynamic_layer", tensors=tensors)
    if kind is DynamicSlidingWindowLayer:
        about = {"sliding_window": layer.sliding_window, "seen": layer.cumulative_length}
        return Parts("sliding_window_layer", about, tensors)
    raise InvalidInputError(
        f"layer {index} of the cache is a {type(layer).__name__}, which cannot be saved; read the context "
        "into a DynamicCache"
    )


def _packed_layer_parts(layer: PackedLayer) -> Parts:
    settings = layer.settings
    about = {"tokens_seen": layer.tokens_seen, **{name: getattr(settings, name) for name in _OPTIONS}}
    inner = {"key_codec": settings.key_codec.parts(), "value_codec": settings.value_codec.parts()}
    tokens = layer.tokens
    if tokens is not None:
        inner["tokens"] = _tokens_parts(tokens)
    return Parts("packed_layer", about, inner=inner)


def _tokens_parts(tokens: PackedTokens) -> Parts:
    sinks, recent = tokens.sinks, tokens.recent
    tensors = {
        "sink_keys": sinks.keys,
        "sink_values": sinks.values,
        "recent_keys": recent.keys,
        "recent_values": recent.values,
    }
    if tokens.query_moment is not None:
        tensors["query_moment"] = tokens.query_moment
    inner = {"pages": tokens.pages.parts()}
    if tokens.heads is not None:
        inner["heads"] = tokens.heads.parts()
    if tokens.demoted is not None:
        inner["coarse"] = _demoted_parts(tokens.demoted)
    inner |= _transform_parts(tokens)
    return Parts("packed_tokens", tensors=tensors, inner=inner)


def _demoted_parts(demoted: DemotedPages) -> Parts:
    codecs = {"key_codec": demoted.key_codec.parts(), "value_codec": demoted.value_codec.parts()}
    inner = {"pages": demoted.pages.parts(), **codecs, **_transform_parts(demoted)}
    return Parts("coarse_pages", inner=inner)


def _transform_parts(packed: PackedTokens | DemotedPages) -> dict[str, Parts]:
    both = zip(_SIDES, (packed.key_transform, packed.value_transform), strict=True)
    return {
        f"{side}_transform": Parts("transform", tensors=one.tensors())
        for side, one in both
        if one is not None
    }


def _packed_layer(parts: Parts) -> PackedLayer:
    keys, values = (codec_of(parts.inner[f"{side}_codec"]) for side in _SIDES)
    settings = LayerSettings(keys, values, **{name: parts.about[name] for name in _OPTIONS})
    layer = PackedLayer(settings)
    if "tokens" in parts.inner:
        tokens = _tokens(parts.inner["tokens"], settings)
        layer.lazy_initialization(tokens.sinks.keys, tokens.sinks.values)
        layer._tokens = tokens
    layer.tokens_seen = int(parts.about["tokens_seen"])
    return layer


def _tokens(parts: Parts, settings: LayerSettings) -> PackedTokens:
    sinks = DenseSegment(parts.tensors["sink_keys"], parts.tensors["sink_values"])
    recent = DenseSegment(parts.tensors["recent_keys"], parts.tensors["recent_values"])
    tokens = PackedTokens(settings, sinks.keys[:, :, :0], sinks.values[:, :, :0])
    tokens.sinks, tokens._recent = sinks, recent
    tokens.query_moment = parts.tensors.get("query_moment")
    tokens.pages = rebuild(parts.inner["pages"], *_PAGES)
    tokens.heads = rebuild(parts.inner["heads"], "head_counts") if "heads" in parts.inner else None
    tokens.key_transform, tokens.value_transform = (_transform(parts, side) for side in _SIDES)
    if "coarse" in parts.inner:
        tokens.demoted = rebuild(parts.inner["coarse"], "coarse_pages")
    check_tokens(tokens)
    return tokens


def _demoted(parts: Parts) -> DemotedPages:
    pages = rebuild(parts.inner["pages"], "even_pages")
    keys, values = (codec_of(parts.inner[f"{side}_codec"]) for side in _SIDES)
    transforms = (_transform(parts, side) or ChannelTransform() for side in _SIDES)
    return DemotedPages(pages, keys, values, *transforms)


def _transform(parts: Parts, side: str) -> ChannelTransform | None:
    part = parts.inner.get(f"{side}_transform")
    return None if part is None else ChannelTransform(**part.tensors)


def _dynamic_layer(parts: Parts) -> DynamicLayer:
    return _filled(DynamicLayer(), parts)


def _sliding_window_layer(parts: Parts) -> DynamicLayer:
    layer = DynamicSlidingWindowLayer(int(parts.about["sliding_window"]))
    layer.cumulative_length = int(parts.about["seen"])
    return _filled(layer, parts)


def _filled(layer: DynamicLayer, parts: Parts) -> DynamicLayer:
    if parts.tensors:
        keys, values = parts.tensors["keys"], parts.tensors["values"]
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return layer


register_maker("packed_layer", _packed_layer)
register_maker("coarse_pages", _demoted)
register_maker("dynamic_layer", _dynamic_layer)
register_maker("sliding_window_layer", _sliding_window_layer)
