"""A packed layer that also keeps a linear-attention state, of models whose layers do both (Falcon-H1)."""

import copy
from typing import Any

from transformers import cache_utils

from quantpress.cache import host
from quantpress.cache.layer import PackedLayer
from quantpress.cache.settings import LayerSettings

_StateLayer: Any = getattr(cache_utils, "LinearAttentionLayer", type("NoStateLayer", (), {}))


class PackedHybridLayer(_StateLayer, PackedLayer):
    """`PackedLayer` for the tokens, transformers' `LinearAttentionLayer` for the state."""

    is_compileable = False
    is_croppable = getattr(_StateLayer, "is_croppable", False)

    def __init__(self, settings: LayerSettings) -> None:
        _StateLayer.__init__(self)
        PackedLayer.__init__(self, settings)

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

    def take_over(self, layer: Any) -> None:
        self.__dict__.update(host.linear_states(layer))

    def snapshot(self) -> Any:
        return PackedLayer.snapshot(self), copy.deepcopy(host.linear_states(self))

    def restore(self, snapshot: Any) -> None:
        tokens, states = snapshot
        PackedLayer.restore(self, tokens)
        self.__dict__.update(copy.deepcopy(states))


def packed_kind(layer: Any) -> type[PackedLayer]:
    """The class of the packed layer that takes the place of a layer; see `PackedLayer.take_over`."""
    return PackedHybridLayer if host.linear_states(layer) else PackedLayer
