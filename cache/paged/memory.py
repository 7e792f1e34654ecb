"""The bytes that paged attention holds, measured from its tensors. All are allocated from the start."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantpress.cache.memory import storage_bytes
from quantpress.cache.paged.storage import PoolStorage
from quantpress.kernels.layout import PAGE_TOKENS


@dataclass(frozen=True)
class PagedMemory:
    """The bytes of paged attention, all layers together.

    Args:
        packed_bytes: codes and scales of all blocks.
        dense_bytes: sinks and windows of all sequences, in the pool's own dtype.
        metadata_bytes: mean keys, channel weights and orders of all sequences.
        table_bytes: block tables and lengths.
        packed_tokens: capacity of the blocks, in tokens.
        dense_tokens: capacity of the windows, in tokens.
        uncompressed_bytes_per_token: bytes of a token in the pool's own dtype.
    """

    packed_bytes: int
    dense_bytes: int
    metadata_bytes: int
    table_bytes: int
    packed_tokens: int
    dense_tokens: int
    uncompressed_bytes_per_token: int

    @property
    def total_bytes(self) -> int:
        """All bytes held."""
        return self.packed_bytes + self.dense_bytes + self.metadata_bytes + self.table_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of a packed token, scales included."""
        return self.packed_bytes / self.packed_tokens

    @property
    def ratio(self) -> float:
        """Uncompressed bytes of as many tokens as the capacity, over the bytes held."""
        tokens = self.packed_tokens + self.dense_tokens
        return tokens * self.uncompressed_bytes_per_token / self.total_bytes


def paged_memory(pool: PoolStorage, tables: Sequence[torch.Tensor]) -> PagedMemory:
    """Measure a pool and its tables."""
    size, seen = pool.size, set[int]()
    channels = pool.keys.codec.head_dim + pool.values.codec.head_dim
    return PagedMemory(
        packed_bytes=storage_bytes(pool.packed_tensors(), seen),
        dense_bytes=storage_bytes(pool.dense_tensors(), seen),
        metadata_bytes=storage_bytes(pool.metadata_tensors(), seen),
        table_bytes=storage_bytes(list(tables), seen),
        packed_tokens=size.blocks * PAGE_TOKENS,
        dense_tokens=size.sequences * pool.window_tokens,
        uncompressed_bytes_per_token=size.layers * size.kv_heads * channels * pool.dtype.itemsize,
    )
