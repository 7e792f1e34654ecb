"""The bytes of a cache before there is one: equal to what `quantpress.cache.memory` would measure."""

import torch

from quantpress.cache.memory import LayerMemory
from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.eviction import EvictionPlan
from quantpress.codecs.protocol import PageCodec, one_page
from quantpress.errors import InvalidInputError
from quantpress.kernels.layout import PAGE_TOKENS

_STATISTIC_BYTES = 4  # mean or weight of a channel, float32
_ORDER_BYTES = 2  # entry of a channel order, int16
_COUNT_BYTES = 4  # length of a head or entry of the page table, int32


def layer_estimate(
    settings: LayerSettings | None,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    batch: int = 1,
    balanced: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> LayerMemory:
    """The bytes of one layer right after a prefill.

    Args:
        settings: how the layer stores tokens; None: it is not packed.
        tokens: number of tokens that each head keeps.
        kv_heads: Hkv.
        head_dim: D of the keys.
        value_dim: Dv of the values; None: D.
        batch: B.
        balanced: whether queries are known, so that channels are balanced.
        dtype: dtype of the keys and values that the model computes.

    Raises:
        InvalidInputError: `tokens` is negative, another number is below 1, or the codecs are for another
            number of heads.
    """
    value_dim = head_dim if value_dim is None else value_dim
    counts = {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim, "batch": batch}
    for name, count in {**counts, "tokens": tokens + 1}.items():
        if count < 1:
            raise InvalidInputError(f"{name} is out of range: {count - (name == 'tokens')}")
    heads, width = batch * kv_heads, head_dim + value_dim
    token_bytes = heads * width * dtype.itemsize
    whole, numbers = tokens * token_bytes, tokens * heads * width
    if settings is None:
        return LayerMemory(tokens, 0, 0, whole, 0, whole, token_bytes, numbers)
    pages = max(0, tokens - settings.sink_tokens - settings.recent_tokens) // PAGE_TOKENS
    dense = tokens - pages * PAGE_TOKENS
    page = sum(page_nbytes(codec, dtype, kv_heads) for codec in (settings.key_codec, settings.value_codec))
    return LayerMemory(
        tokens=tokens,
        packed_tokens=pages * PAGE_TOKENS,
        packed_bytes=batch * pages * page,
        dense_bytes=heads * dense * width * dtype.itemsize,
        metadata_bytes=heads * _statistics(settings, pages > 0, balanced),
        uncompressed_bytes=whole,
        token_bytes=token_bytes,
        numbers=numbers,
    )


def head_wise_bytes(
    settings: LayerSettings,
    hidden: torch.Tensor,
    balanced: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """The bytes of one layer right after a head-wise eviction.

    Args:
        settings: how the layer stores tokens.
        hidden: [B, Hkv, T] bool, True where a head does not keep a token. Waits for its device.
        balanced: whether queries are known, so that channels are balanced.
        dtype: dtype of the keys and values that the model computes.
    """
    plan = EvictionPlan.of_prefill(settings, hidden)
    keys, values = settings.key_codec, settings.value_codec
    heads = hidden.shape[0] * hidden.shape[1]
    dense = plan.sinks.shape[2] + plan.rest.shape[2] - plan.packed
    pages = plan.packed // PAGE_TOKENS
    counts = (2 + pages) * _COUNT_BYTES  # sinks, padding, a line of the page table
    head_bytes = dense * (keys.head_dim + values.head_dim) * dtype.itemsize + counts
    head_bytes += _statistics(settings, pages > 0, balanced)
    page = page_nbytes(keys, dtype) + page_nbytes(values, dtype)
    return heads * head_bytes + int(plan.pages_in_use.sum()) * page


def page_nbytes(codec: PageCodec, dtype: torch.dtype = torch.bfloat16, kv_heads: int = 1) -> int:
    """Bytes of a page of some heads, scales included, found by encoding a page of zeros.

    Raises:
        InvalidInputError: the codec is for another number of heads.
    """
    if codec.kv_heads not in (None, kv_heads):
        raise InvalidInputError(
            f"the widths are for {codec.kv_heads} KV heads, but the layer has {kv_heads}; give one for each "
            "head of a layer"
        )
    page = sum(plane.nbytes for plane in one_page(codec, dtype).values())
    return page * kv_heads if codec.kv_heads is None else page


def _statistics(settings: LayerSettings, packed: bool, balanced: bool) -> int:
    """Bytes of the channel transforms of a head; before its first page, those of the query moment."""
    keys, values = settings.key_codec, settings.value_codec
    balance = settings.balance and balanced and keys.wants_statistics
    if not packed:
        return balance * keys.head_dim * _STATISTIC_BYTES
    mean = settings.mean_key and keys.wants_statistics
    orders = sum(one.head_dim * _ORDER_BYTES for one in (keys, values) if len(one.groups) > 1)
    return (mean + balance) * keys.head_dim * _STATISTIC_BYTES + orders
