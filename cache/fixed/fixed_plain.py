"""Layers of transformers' own at fixed addresses: what a captured step needs of layers that nothing packs.

Sliding-window layers, and full layers that a press only evicts from or leaves alone, keep their tokens in a
`Room`: memory of a fixed size that a step writes one token to, at an index read on the device. A full layer
fills its room from the front. A sliding-window layer writes round and round in as many places as its window
has; attention does not ask for the order of tokens, positions are in the keys.

A layer at fixed addresses changes its class for that time, so that everyone who holds it goes on holding it:
steps write to the room, and any other use puts the plain layer back, with tensors, first.
"""

from typing import Any, ClassVar

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantpress.cache.attention import compiled_step
from quantpress.cache.attention.states import PackedStates
from quantpress.cache.fixed.room import Room
from quantpress.kernels.attend import DenseSegment


class FixedLayer(DynamicLayer):
    """A `DynamicLayer` whose tokens lie in a `Room`; see `fix`.

    Attributes:
        stepping: a single token that arrives now belongs to a step.
        fixed: the room.
    """

    plain: ClassVar[type[DynamicLayer]] = DynamicLayer
    stepping = False
    fixed: Room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values."""
        if self.stepping and compiled_step.is_compiled_step():
            return key_states, value_states  # `step_attention` appends them
        if not (self.stepping and key_states.shape[2] == 1):
            self.release()
            return self.update(key_states, value_states, cache_kwargs)
        self.fixed.append(key_states, value_states)
        self.count(1)
        view = self.fixed.view()
        return PackedStates(view, "keys"), PackedStates(view, "values")

    def count(self, tokens: int) -> None:
        """The host's count of what steps have written."""
        self.fixed.written += tokens

    def release(self) -> None:
        """Become the plain layer again."""
        tokens = self.fixed.take()
        for name in ("fixed", "stepping"):
            vars(self).pop(name, None)
        self.__class__ = self.plain  # type: ignore[assignment]
        self.keys, self.values = tokens.keys, tokens.values

    def get_seq_length(self) -> int:
        """Tokens kept."""
        return self.fixed.written

    def reset(self) -> None:
        """Forget every token."""
        self.release()
        self.reset()

    @property
    def keys(self) -> torch.Tensor:
        """A copy of all keys [B, Hkv, T, D]; assigning others puts the plain layer back."""
        return self.fixed.tokens().keys

    @keys.setter
    def keys(self, value: torch.Tensor) -> None:
        self.release()
        self.keys = value

    @property
    def values(self) -> torch.Tensor:
        """A copy of all values [B, Hkv, T, Dv]; see `keys`."""
        return self.fixed.tokens().values

    @values.setter
    def values(self, value: torch.Tensor) -> None:
        self.release()
        self.values = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies are plain layers."""
        state = {name: value for name, value in vars(self).items() if name not in ("fixed", "stepping")}
        return _plain_layer, (self.plain, {**state, "keys": self.keys, "values": self.values})


class FixedSlidingLayer(FixedLayer, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` whose last tokens go round in a `Room`."""

    plain = DynamicSlidingWindowLayer

    def count(self, tokens: int) -> None:
        """As for `FixedLayer`."""
        super().count(tokens)
        self.cumulative_length += tokens

    def get_seq_length(self) -> int:
        """Tokens seen."""
        length: int = self.cumulative_length
        return length


def _plain_layer(kind: type[DynamicLayer], state: dict[str, Any]) -> DynamicLayer:
    layer = object.__new__(kind)
    vars(layer).update(state)
    return layer


FIXED_KINDS: dict[type, type[FixedLayer]] = {
    DynamicLayer: FixedLayer,
    DynamicSlidingWindowLayer: FixedSlidingLayer,
}
"""Plain layers, and what they become."""


def tokens_of(layer: Any) -> DenseSegment:
    """Keys and values of a plain layer, as views of its room where it has one."""
    return layer.fixed.held if isinstance(layer, FixedLayer) else DenseSegment(layer.keys, layer.values)


def fix(layer: Any, room: Room) -> None:
    """Bring a plain layer to fixed addresses.

    Args:
        layer: of one of `FIXED_KINDS`, with tokens.
        room: one that `suits` them.
    """
    room.fill(tokens_of(layer))
    for name in ("keys", "values"):
        del vars(layer)[name]
    layer.__class__ = FIXED_KINDS[type(layer)]
    vars(layer)["fixed"] = room
