"""Layers of transformers' own at fixed addresses: what a captured step needs of layers that nothing packs.

Sliding-window layers, and full layers that a press only evicts from or leaves alone, keep their tokens in a
`TokenBuffer`, which has a fixed size. A step writes one token to it, at an index that it reads on the device.
A full layer fills its buffer from the front. A sliding-window layer writes round and round in as many slots
as its window has; attention does not depend on the order of tokens, since positions are in the keys.

Caches, their copies and their users hold the layer itself. So it stays the same object and changes its class
(`become`): steps write to the buffer, and any other use makes it the plain layer with tensors again first.
"""

from typing import Any, ClassVar

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantpress.cache.attention.states import PackedStates
from quantpress.cache.attention.step import is_compiled_step
from quantpress.cache.fixed.buffer import TokenBuffer
from quantpress.kernels.attend import DenseSegment


def become(layer: Any, kind: type, state: dict[str, Any]) -> None:
    """Turn an object into one of another class that has these attributes, and no others.

    Nothing else in the project assigns `__class__`.

    Args:
        layer: of a class without `__slots__`.
        kind: its class from now on.
        state: its attributes from now on, by name.
    """
    layer.__class__ = kind
    layer.__dict__ = dict(state)


class BufferedLayer(DynamicLayer):
    """A `DynamicLayer` whose tokens lie in a `TokenBuffer`; see `fix`.

    Attributes:
        stepping: a single token that arrives now belongs to a step.
        fixed: the buffer.
    """

    plain: ClassVar[type[DynamicLayer]] = DynamicLayer
    stepping = False
    fixed: TokenBuffer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all keys and values."""
        if self.stepping and is_compiled_step():
            return key_states, value_states  # `step_attention` appends them
        if not (self.stepping and key_states.shape[2] == 1):
            self.release()
            return self.update(key_states, value_states, *args, **kwargs)
        self.fixed.append(key_states, value_states)
        self.count(1)
        view = self.fixed.view()
        return PackedStates(view, "keys"), PackedStates(view, "values")

    def count(self, tokens: int) -> None:
        """Count, on the host, tokens that steps have written."""
        self.fixed.written += tokens

    def release(self) -> None:
        """Become the plain layer again."""
        become(self, self.plain, self._plain_state(self.fixed.take()))

    def _plain_state(self, tokens: DenseSegment) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("fixed", "stepping")}
        return {**state, "keys": tokens.keys, "values": tokens.values}

    def get_seq_length(self) -> int:
        """Tokens kept."""
        return self.fixed.written

    def reset(self) -> None:
        """Forget every token."""
        self.release()
        self.reset()

    @property
    def keys(self) -> torch.Tensor:
        """A copy of all keys [B, Hkv, T, D]; assigning others makes this the plain layer again."""
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
        return object.__new__, (self.plain,), self._plain_state(self.fixed.tokens())


class BufferedSlidingLayer(BufferedLayer, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` whose last tokens go round in a `TokenBuffer`."""

    plain = DynamicSlidingWindowLayer

    def count(self, tokens: int) -> None:
        """As for `BufferedLayer`."""
        super().count(tokens)
        self.cumulative_length += tokens

    def get_seq_length(self) -> int:
        """Tokens seen."""
        length: int = self.cumulative_length
        return length


BUFFERED: dict[type, type[BufferedLayer]] = {
    DynamicLayer: BufferedLayer,
    DynamicSlidingWindowLayer: BufferedSlidingLayer,
}
"""Plain layers, and what they become."""


def is_plain(layer: object) -> bool:
    """Whether this is one of the plain layers above, at fixed addresses or not."""
    records = getattr(layer, "record_past", False)  # a sliding window that keeps more, to be cropped
    return (type(layer) in BUFFERED and not records) or isinstance(layer, BufferedLayer)


def tokens_of(layer: Any) -> DenseSegment:
    """Keys and values of a plain layer, as views of its buffer where it has one."""
    return layer.fixed.in_use if isinstance(layer, BufferedLayer) else DenseSegment(layer.keys, layer.values)


def fix(layer: Any, buffer: TokenBuffer) -> None:
    """Bring a plain layer to fixed addresses.

    Args:
        layer: one of the classes in `BUFFERED`, with tokens.
        buffer: one that `suits` them.
    """
    buffer.fill(tokens_of(layer))
    state = {name: value for name, value in vars(layer).items() if name not in ("keys", "values")}
    become(layer, BUFFERED[type(layer)], {**state, "fixed": buffer})
