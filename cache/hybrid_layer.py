"""A packed layer that also keeps a linear-attention state, of models whose layers do both (Falcon-H1)."""

import copy
from typing import Any

import torch
from transformers import cache_utils

from quantpress.cache import host
from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings

_StateLayer: Any = getattr(cache_utils, "LinearAttentionLayer", type("NoStateLayer", (), {}))


class PackedHybridLayer(_StateLayer, PackedLayer):
    """`PackedLayer` for the tokens, transformers' `LinearAttentionLayer` for the state."""

    is_compileable = False
    is_croppable = getattr(_StateLayer, "is_croppable", False)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Start the tokens, from keys and values, or the state, from arguments by name."""
        (_StateLayer if kwargs else PackedLayer).lazy_initialization(self, *args, **kwargs)

    def reorder_cache(self, beam_idx: Any) -> None:
        _StateLayer.reorder_cache(self, beam_idx)
        PackedLayer.reorder_cache(self, beam_idx)

    def reset(self) -> None:
        _StateLayer.reset(self)
        PackedLayer.reset(self)

    def crop(self, max_length: int) -> None:
        _StateLayer.crop(self, max_length)
        PackedLayer.crop(self, max_length)

    def offload(self) -> None:
        _StateLayer.offload(self)
        PackedLayer.offload(self)

    def prefetch(self) -> None:
        _StateLayer.prefetch(self)
        PackedLayer.prefetch(self)

    def snapshot(self) -> Any:
        return PackedLayer.snapshot(self), copy.deepcopy(host.linear_states(self))

    def restore(self, snapshot: Any) -> None:
        tokens, states = snapshot
        PackedLayer.restore(self, tokens)
        self.__dict__.update(copy.deepcopy(states))


def packed_in_place_of(
    layer: Any, keys: torch.Tensor, values: torch.Tensor, settings: LayerSettings, **options: Any
) -> PackedLayer:
    """Pack the keys and values of a layer, and take over the linear-attention state that it keeps, if any.

    Args:
        layer: the layer of a cache that the packed one will replace.
        keys: as `PackedLayer.from_states` takes them.
        values: the same.
        settings: the same.
        **options: the other arguments of `PackedLayer.from_states`.

    Raises:
        NonFiniteError, InvalidInputError: as `PackedLayer.from_states`.
    """
    states = host.linear_states(layer)
    kind = PackedHybridLayer if states else PackedLayer
    packed: PackedLayer = kind.from_states(keys, values, settings, **options)
    packed.__dict__.update(states)
    return packed
