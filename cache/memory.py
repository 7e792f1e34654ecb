"""The bytes that a cache holds, measured from the storage of its tensors, not computed from a bit width."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache

from quantpress.cache import host
from quantpress.cache.fixed.plain import tokens_of
from quantpress.cache.layer import PackedLayer
from quantpress.cache.tokens.packed_tokens import PackedTokens


@dataclass(frozen=True)
class LayerMemory:
    """The bytes of one cache layer.

    Args:
        tokens: tokens that the layer counts, including those that single heads have evicted.
        packed_tokens: packed tokens of the head that has most of them.
        packed_bytes: codes and scales, spare capacity included.
        dense_bytes: tokens kept in the model's own dtype.
        metadata_bytes: mean keys, channel weights and orders, page tables and lengths of heads.
        uncompressed_bytes: bytes of the tokens that heads keep if uncompressed, in the model's own dtype.
        token_bytes: uncompressed bytes of one token in all heads.
        numbers: number of values in the keys and values of the tokens that heads keep.
        state_bytes: states of fixed size beside tokens, or in their place (linear attention, state spaces,
            convolutions).
    """

    tokens: int
    packed_tokens: int
    packed_bytes: int
    dense_bytes: int
    metadata_bytes: int
    uncompressed_bytes: int
    token_bytes: int
    numbers: int
    state_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All bytes kept."""
        return self.packed_bytes + self.dense_bytes + self.metadata_bytes + self.state_bytes

    @property
    def tokens_kept(self) -> float:
        """Tokens kept, averaged over heads: fewer than `tokens` if single heads have evicted some."""
        return self.uncompressed_bytes / self.token_bytes if self.token_bytes else 0.0


@dataclass(frozen=True)
class CacheMemory:
    """The bytes of a cache, layer by layer.

    Args:
        layers: one entry for each layer.
    """

    layers: tuple[LayerMemory, ...]

    def _sum(self, name: str) -> int:
        return sum(getattr(layer, name) for layer in self.layers)

    @property
    def packed_bytes(self) -> int:
        """Codes and scales, spare capacity included."""
        return self._sum("packed_bytes")

    @property
    def dense_bytes(self) -> int:
        """Tokens kept in the model's own dtype."""
        return self._sum("dense_bytes")

    @property
    def metadata_bytes(self) -> int:
        """Mean keys, channel weights and orders, page tables and lengths of heads."""
        return self._sum("metadata_bytes")

    @property
    def state_bytes(self) -> int:
        """States of fixed size, which do not grow with the text; 0 in models of attention alone."""
        return self._sum("state_bytes")

    @property
    def total_bytes(self) -> int:
        """All bytes kept."""
        return self._sum("total_bytes")

    @property
    def uncompressed_bytes(self) -> int:
        """Bytes of the kept tokens if uncompressed, in the model's own dtype."""
        return self._sum("uncompressed_bytes")

    @property
    def numbers(self) -> int:
        """Number of values in the keys and values of the kept tokens."""
        return self._sum("numbers")

    @property
    def ratio(self) -> float:
        """Uncompressed bytes of the kept tokens divided by all bytes kept; 1.0 for an empty cache.

        States of fixed size count on both sides. The ratio of an uncompressed cache is 1.0 in every dtype,
        unless it keeps more storage than its tokens need.
        """
        whole = self.uncompressed_bytes + self.state_bytes
        return whole / self.total_bytes if self.total_bytes else 1.0

    @property
    def bits_per_value(self) -> float:
        """True bits per cached value, everything but states included; 0.0 for an empty cache."""
        return 8 * (self.total_bytes - self.state_bytes) / self.numbers if self.numbers else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        totals = (
            "packed_bytes",
            "dense_bytes",
            "metadata_bytes",
            "state_bytes",
            "total_bytes",
            "uncompressed_bytes",
            "ratio",
            "bits_per_value",
        )
        layers = [{**asdict(layer), "total_bytes": layer.total_bytes} for layer in self.layers]
        return {**{name: getattr(self, name) for name in totals}, "layers": layers}


def cache_memory(cache: Cache) -> CacheMemory:
    """Measure the storage of every tensor that the layers of a cache keep.

    A storage shared between tensors counts once; a slice counts with the whole storage that it keeps alive.

    Args:
        cache: any transformers cache, with or without packed layers.

    Returns:
        Bytes of each layer, by kind.
    """
    seen: set[int] = set()
    return CacheMemory(tuple(_layer_memory(layer, seen) for layer in cache.layers))


def _layer_memory(layer: Any, seen: set[int]) -> LayerMemory:
    kept = host.linear_states(layer)
    states = [
        state
        for kind in ("conv_states", "recurrent_states")
        for state in kept.get(kind, {}).values()
        if state is not None
    ]
    tokens = _packed_memory(layer, seen) if isinstance(layer, PackedLayer) else _plain_memory(layer, seen)
    return replace(tokens, state_bytes=storage_bytes(states, seen)) if states else tokens


def _plain_memory(layer: Any, seen: set[int]) -> LayerMemory:
    tensors = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    held = tokens_of(layer) if host.keeps_tokens(layer) else None
    states = [] if held is None else [t for t in (held.keys, held.values) if isinstance(t, torch.Tensor)]
    tokens = states[0].shape[-2] if states and states[0].dim() == 4 else 0
    uncompressed = sum(t.nbytes for t in states)
    return LayerMemory(
        tokens=tokens,
        packed_tokens=0,
        packed_bytes=0,
        dense_bytes=storage_bytes(states, seen),
        metadata_bytes=storage_bytes(tensors, seen),
        uncompressed_bytes=uncompressed,
        token_bytes=uncompressed // tokens if tokens else 0,
        numbers=sum(t.numel() for t in states),
    )


def _packed_memory(layer: PackedLayer, seen: set[int]) -> LayerMemory:
    tokens = layer.tokens
    if tokens is None:
        return LayerMemory(*[0] * 8)
    stored = tokens if layer.fixed is None else layer.fixed
    keys, values = tokens.sinks.keys, tokens.sinks.values
    kept = kept_tokens(tokens)
    head_bytes = (
        keys.shape[-1] * keys.element_size() + values.shape[-1] * values.element_size()
    )  # of one token
    return LayerMemory(
        tokens=len(tokens),
        packed_tokens=tokens.packed_tokens,
        packed_bytes=storage_bytes(stored.packed_tensors(), seen),
        dense_bytes=storage_bytes(stored.dense_tensors(), seen),
        metadata_bytes=storage_bytes(stored.metadata_tensors(), seen),
        uncompressed_bytes=kept * head_bytes,
        token_bytes=keys.shape[0] * keys.shape[1] * head_bytes,
        numbers=kept * (keys.shape[-1] + values.shape[-1]),
    )


def kept_tokens(tokens: PackedTokens) -> int:
    """Tokens kept, summed over batch and KV heads. Waits for the device after a head-wise eviction."""
    batch, heads = tokens.sinks.keys.shape[:2]
    if tokens.heads is None:
        return batch * heads * len(tokens)
    rest = batch * heads * (tokens.stored_length - tokens.sinks.tokens)
    return int(tokens.heads.sinks.sum()) + rest - int(tokens.heads.padding.sum())


def storage_bytes(tensors: list[torch.Tensor], seen: set[int] | None = None) -> int:
    """Bytes of the storages behind tensors; each storage counts once.

    Args:
        tensors: any tensors.
        seen: data pointers of storages already counted; new ones are added.
    """
    seen = set() if seen is None else seen
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
