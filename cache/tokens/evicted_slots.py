"""The names of tokens that are gone: what kvpress leaves on an attention module, in one bit a token."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

MASKS = "masked_key_indices"
"""Where head-wise presses of kvpress name, on an attention module, what must not be seen."""

_BITS = 8


class EvictedSlots(Sequence[torch.Tensor]):
    """Batch, head and slot indices of tokens that single heads have evicted; made when they are asked for.

    It takes the place of kvpress's three index tensors, 24 bytes a token, for those who look what was
    evicted. Attention does not need it: the layer has no such tokens any more.

    Args:
        hidden: [B, Hkv, T] bool, True for the tokens that are gone.

    Example:
        >>> batch, head, slot = EvictedSlots(torch.tensor([[[False, True], [True, True]]]))
        >>> head.tolist(), slot.tolist()
        ([0, 1, 1], [1, 0, 1])
    """

    def __init__(self, hidden: torch.Tensor) -> None:
        self.tokens = hidden.shape[2]
        padded = torch.nn.functional.pad(hidden, (0, -self.tokens % _BITS)).unflatten(2, (-1, _BITS))
        places = torch.arange(_BITS, dtype=torch.uint8, device=hidden.device)
        self._bits = (padded.byte() << places).sum(-1, dtype=torch.uint8)  # [B, Hkv, T / 8]

    @property
    def hidden(self) -> torch.Tensor:
        """[B, Hkv, T] bool."""
        places = torch.arange(_BITS, dtype=torch.uint8, device=self._bits.device)
        spread: torch.Tensor = (self._bits.unsqueeze(-1) >> places) & 1
        return spread.bool().flatten(2)[:, :, : self.tokens]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.hidden.nonzero(as_tuple=True))

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: Any) -> Any:
        return self.hidden.nonzero(as_tuple=True)[index]


def named_to_hide(module: torch.nn.Module) -> Any:
    """The indices of tokens that attention has to hide, in the way of kvpress; None where there are none."""
    named = getattr(module, MASKS, None)
    return None if named is None or isinstance(named, EvictedSlots) or not len(named[0]) else named
