"""Layers that keep linear-attention states, and placeholders, to parts and back."""

from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer

from quantpress.cache import host
from quantpress.cache.hybrid_layer import PackedHybridLayer
from quantpress.cache.layer import PackedLayer
from quantpress.codecs.parts import Parts, rebuild, register_maker
from quantpress.errors import InvalidInputError

_TENSORS = ("conv_states", "recurrent_states")


def state_parts(index: int, layer: Any, tokens: Parts | None) -> Parts:
    """The parts of a layer with states.

    Args:
        index: of the layer.
        layer: of `host.LINEAR_LAYER`.
        tokens: the parts of the tokens that it keeps beside the states; None: it keeps none.

    Raises:
        InvalidInputError: the states are recorded, to be cropped.
    """
    states = host.linear_states(layer)
    if states["record_past"]:
        raise InvalidInputError(
            f"layer {index} of the cache records its past, to be cropped, and cannot be saved; save a "
            "context before assisted decoding"
        )
    held = [(f"{kind}{slot}", state) for kind in _TENSORS for slot, state in states[kind].items()]
    tensors = {name: state for name, state in held if state is not None}
    slots = range(states["number_of_states"])
    about = {
        "states": len(slots),
        "kernel": [states["conv_kernel_size"][slot] for slot in slots],
        "previous": [states["has_previous_state"][slot] for slot in slots],
    }
    return Parts("state_layer", about, tensors, {} if tokens is None else {"tokens": tokens})


def _state_layer(parts: Parts) -> Any:
    if not host.HOLDS_STATES:
        raise InvalidInputError("layers with linear-attention states need transformers 5.17 or later")
    count = int(parts.about["states"])
    tokens = rebuild(parts.inner["tokens"], "packed_layer", "dynamic_layer") if parts.inner else None
    layer = _empty(tokens, count)
    states: dict[str, Any] = host.linear_states(layer)
    for kind in _TENSORS:
        states[kind].update({slot: parts.tensors.get(f"{kind}{slot}") for slot in range(count)})
        initialized = states[f"is_{kind}_initialized"]
        initialized.update({slot: state is not None for slot, state in states[kind].items()})
        for state in filter(lambda one: one is not None, states[kind].values()):
            layer.dtype, layer.device = state.dtype, state.device
    states["conv_kernel_size"].update(enumerate(parts.about["kernel"]))
    states["has_previous_state"].update(enumerate(parts.about["previous"]))
    return layer


def _empty(tokens: Any, count: int) -> Any:
    """A layer with so many states, none of them known, that has taken over these tokens."""
    kinds: Any = cache_utils
    if tokens is None:
        return kinds.LinearAttentionLayer(number_of_states=count)
    states = host.linear_states(kinds.LinearAttentionLayer(number_of_states=count))
    packed = isinstance(tokens, PackedLayer)
    layer = (
        PackedHybridLayer(tokens.settings) if packed else kinds.LinearAttentionAndFullAttentionLayer(count)
    )
    layer.__dict__.update(vars(tokens) | states)
    return layer


def placeholder_parts(layer: Any) -> Parts | None:
    """The parts of a layer that keeps nothing; None for all others."""
    empty = not host.keeps_tokens(layer) and not isinstance(layer, host.LINEAR_LAYER)
    return Parts("dummy_layer") if empty else None


def _dummy_layer(parts: Parts) -> Any:
    kinds: Any = cache_utils
    return kinds.DummyLayer() if hasattr(kinds, "DummyLayer") else DynamicLayer()


register_maker("state_layer", _state_layer)
register_maker("dummy_layer", _dummy_layer)
