"""The bytes that the cache takes inside a serving engine: packed blocks, and what lies beside them.

A block holds 128 tokens of all KV heads. Codes and scales of keys and values lie in the engine's own blocks.
The recent tokens of each request and the first tokens of prompts, both in 16 bits, and the statistics of keys
are allocated beside them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from quantpress.cache.saved.width_plan import WidthPlan
from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.errors import InvalidInputError
from quantpress.kernels.attend.triton_attend import MOST_HEAD_DIM, in_tiles
from quantpress.kernels.layout import PAGE_TOKENS, page_bytes

WIDTHS = (2, 3, 4)
"""Bits of a code in an engine's blocks."""

HEAD_DIMS = tuple(dim for dim in range(MOST_HEAD_DIM + 1) if in_tiles(dim))
"""Head_dims of which kernels read an engine's blocks, which have page keys: those of int8 tensor cores."""

PLANE_ALIGNMENT = 16
"""Bytes; the kernels load 16 at a time, so that each plane of a page begins at a multiple of it."""

RECENT_PAGES = 2
"""Pages of 128 tokens that a request has in 16 bits: the one that is being filled, and the one before."""

LEAST_SINK_ENTRIES = 1024
SINK_ENTRIES_PER_REQUEST = 4

_SCALE_BYTES = 2  # of a key or value vector, and of a channel of a page's own keys, float16
_PAGE_KEYS = 2  # of each page: mean and sink
_STATISTIC_BYTES = 4  # of a channel, float32
_NAME = re.compile(r"quantpress_(?:([234])bit|k([234])v([234]))")


def engine_widths(name: str) -> tuple[int, int]:
    """Bits of keys and of values of one of the plugin's KV-cache dtypes.

    Raises:
        InvalidInputError: there is no such dtype.

    Example:
        >>> engine_widths("quantpress_3bit"), engine_widths("quantpress_k4v3")
        ((3, 3), (4, 3))
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise InvalidInputError(
            f"there is no KV-cache dtype {name!r}; use quantpress_4bit, quantpress_3bit, quantpress_2bit, or "
            "a pair such as quantpress_k4v3"
        )
    both, keys, values = found.groups()
    return int(both or keys), int(both or values)


def why_not_head_dim(head_dim: int) -> str | None:
    """Why no kernel reads an engine's blocks of a head_dim; None: one does.

    Example:
        >>> why_not_head_dim(96), why_not_head_dim(72)
        (None, 'the kernels have multiples of 16 from 48 to 256')
    """
    if head_dim in HEAD_DIMS:
        return None
    return f"the kernels have multiples of 16 from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"


def planned_widths(plan: WidthPlan, layers: Iterable[int]) -> list[tuple[int, int]]:
    """Bits of keys and of values that a plan has for the layers of a model in an engine.

    Args:
        plan: of that model.
        layers: indices of its layers.

    Raises:
        InvalidInputError: the plan lacks a layer, or has widths that an engine's blocks cannot have: by head,
            or of 1 or 8 bits; the message names the layer.
    """
    found = []
    for index in layers:
        keys, values = plan.layer(index)
        if isinstance(keys, tuple) or isinstance(values, tuple):
            raise InvalidInputError(
                f"{plan.path or 'the plan'} has widths by head, {keys} for the keys and {values} for the "
                f"values of layer {index}, but all heads of a layer in vLLM have the same; make a plan with "
                "`quantpress fit --by layer --widths 2,3,4`"
            )
        if not {keys, values} <= set(WIDTHS):
            raise InvalidInputError(
                f"{plan.path or 'the plan'} has {keys} bits for the keys and {values} bits for the values of "
                f"layer {index}, but codes in vLLM have {', '.join(map(str, WIDTHS))} bits; make a plan of "
                "these with `quantpress fit --widths 2,3,4`"
            )
        found.append((keys, values))
    return found


def engine_page_bytes(head_dim: int, value_dim: int, key_bits: int, value_bits: int) -> int:
    """Bytes of a packed page: 128 tokens of one KV head in one layer, keys and values with their scales.

    Two keys are stored beside the codes: the mean of the page, and its likeliest sink. Each plane begins at a
    multiple of `PLANE_ALIGNMENT`, and an engine counts whole bytes a token: at a head_dim that is no multiple
    of 32, 64 bytes of a page are empty.

    Args:
        head_dim: D of the keys.
        value_dim: Dv of the values.
        key_bits: bits of a code of the keys.
        value_bits: bits of a code of the values.

    Raises:
        UnsupportedBitsError: no page stores this width.
        InvalidInputError: a dimension is not a positive multiple of 4.

    Example:
        >>> [engine_page_bytes(128, 128, bits, bits) // 128 for bits in (4, 3, 2)]  # a token
        [136, 104, 72]
        >>> [engine_page_bytes(80, 80, bits, bits) / 128 for bits in (4, 3, 2)]
        [87.0, 67.0, 47.0]
    """
    codes = page_bytes(key_bits, head_dim) + page_bytes(value_bits, value_dim)
    keys = _PAGE_KEYS * _whole(head_dim * _SCALE_BYTES, PLANE_ALIGNMENT)
    return _whole(codes + 2 * PAGE_TOKENS * _SCALE_BYTES + keys, PAGE_TOKENS)


def _whole(size: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


@dataclass(frozen=True)
class EngineLayer:
    """What one layer takes beside the engine's blocks, for the KV heads of one process.

    Args:
        kv_heads: Hkv.
        head_dim: D of the keys.
        value_dim: Dv of the values.
        itemsize: bytes of a number in 16 bits; 4 for a float32 model.
        query_heads: Hq; None: as many as KV heads.
    """

    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int = 2
    query_heads: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of a token that is not packed: key and value in every head."""
        return self.kv_heads * (self.head_dim + self.value_dim) * self.itemsize

    @property
    def request_bytes(self) -> int:
        """Bytes of the recent pages of one request."""
        return RECENT_PAGES * PAGE_TOKENS * self.token_bytes

    def recent_bytes(self, requests: int) -> int:
        """Bytes of the recent pages of all requests, and of one more that belongs to none.

        Args:
            requests: most requests at a time, vLLM's max_num_seqs.
        """
        return (requests + 1) * self.request_bytes

    def sink_bytes(self, entries: int) -> int:
        """Bytes of the first tokens of prompts, and of one entry more.

        Args:
            entries: from `sink_entries`.
        """
        return (entries + 1) * DEFAULT_SINK_TOKENS * self.token_bytes

    @property
    def statistics_bytes(self) -> int:
        """Bytes of mean and weight of keys, and of mean and variance of queries."""
        heads = self.kv_heads + (self.query_heads or self.kv_heads)
        return 2 * heads * self.head_dim * _STATISTIC_BYTES

    def block_bytes(self, key_bits: int, value_bits: int) -> int:
        """Bytes of a packed block: one page for each KV head."""
        return self.kv_heads * engine_page_bytes(self.head_dim, self.value_dim, key_bits, value_bits)


def sink_entries(requests: int) -> int:
    """How many prompts have their first tokens in 16 bits, unless the engine is told another number.

    Args:
        requests: most requests at a time.

    Example:
        >>> sink_entries(64), sink_entries(512)
        (1024, 2048)
    """
    return max(LEAST_SINK_ENTRIES, SINK_ENTRIES_PER_REQUEST * requests)
