"""The slots that single heads have evicted, as kvpress names them on an attention module; one bit a slot."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

MASKS = "masked_key_indices"
"""Attribute of an attention module in which head-wise presses of kvpress name the slots to hide."""

_BITS = 8


class EvictedSlots(Sequence[torch.Tensor]):
    """Batch, head and slot indices of tokens that single heads have evicted, computed on request.

    Replaces kvpress's three index tensors, which take 24 bytes a token, for code that reads what was evicted.
    Attention does not need them: the layer no longer has these tokens.

    Args:
        hidden: [B, Hkv, T] bool, True for evicted tokens.

    Example:
        >>> batch, head, slot = EvictedSlots(torch.tensor([[[False, True], [True, True]]]))
        >>> head.tolist(), slot.tolist()
        ([0, 1, 1], [1, 0, 1])
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self.tokens = hidden.shape[2]
        padded = torch.nn.functional.pad(hidden, (0, -self.tokens % _BITS)).unflatten(2, (-1, _BITS))
        shifts = torch.arange(_BITS, dtype=torch.uint8, device=hidden.device)
        self._bits = (padded.byte() << shifts).sum(-1, dtype=torch.uint8)  # [B, Hkv, T / 8]

    @property
    def hidden(self) -> torch.Tensor:
        """[B, Hkv, T] bool."""
        shifts = torch.arange(_BITS, dtype=torch.uint8, device=self._bits.device)
        bits: torch.Tensor = (self._bits.unsqueeze(-1) >> shifts) & 1
        return bits.bool().flatten(2)[:, :, : self.tokens]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.hidden.nonzero(as_tuple=True))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return self.hidden.nonzero(as_tuple=True)[index]


def named_to_hide(module: torch.nn.Module) -> Any:
    """The indices of tokens that attention must hide, in kvpress's form; None if there are none."""
    named = getattr(module, MASKS, None)
    return None if named is None or isinstance(named, EvictedSlots) or not len(named[0]) else named
