"""Warns of a context that was too short for its cache to be packed."""

import warnings

from transformers.cache_utils import Cache

from quantpress.cache.layer import PackedLayer
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses.packing.filled_cache import Quantizer

_LOSSLESS_BITS = 16


def warn_if_nothing_is_packed(press: Quantizer, cache: Cache, tokens: int) -> None:
    """Warn, once for each press, if no layer of a cache holds a packed token.

    Lossless codecs, which save nothing in any case, do not count.

    Args:
        press: the press that has packed the cache.
        cache: the cache at the end of a prefill.
        tokens: tokens of the prefill.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, PackedLayer) and _saves(layer)]
    if not layers or press.warned_of_short_context or any(layer.packed_tokens for layer in layers):
        return
    press.warned_of_short_context = True
    kept = max(layer.tokens.stored_length for layer in layers if layer.tokens is not None)
    shorter = kept < tokens
    settings = layers[0].settings
    sinks, recent = settings.sink_tokens, settings.recent_tokens
    warnings.warn(
        f"nothing of this context was packed: it leaves {kept} tokens{f' of {tokens}' * shorter}, and the "
        f"first page is packed at {sinks + recent + PAGE_TOKENS} ({sinks} sinks, {recent} recent tokens and "
        f"{PAGE_TOKENS} of a page). Give a longer context{', evict fewer tokens' * shorter} or set a smaller "
        "recent_tokens= of TurboQuant; an answer that is long enough fills pages later",
        stacklevel=4,
    )


def _saves(layer: PackedLayer) -> bool:
    codecs = layer.settings.key_codec, layer.settings.value_codec
    return min(codec.bits_per_value for codec in codecs) < _LOSSLESS_BITS
