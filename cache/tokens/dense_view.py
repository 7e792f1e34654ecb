"""A view of a layer's tokens while none of them is packed yet."""

from dataclasses import dataclass, replace

import torch

from quantpress.kernels.attend import DenseSegment


@dataclass(frozen=True)
class DenseView:
    """What `PackedView` is, for tokens of which none is packed yet.

    Args:
        sinks: all tokens, 16 bits.
        tokens: how many of them are in view, counted from the first.
        dtype: of the model's keys and values.
    """

    sinks: DenseSegment
    tokens: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Hkv, tokens in view)."""
        return (*self.sinks.keys.shape[:2], self.tokens)

    def narrow(self, tokens: int) -> "DenseView":
        """The first `tokens` tokens."""
        return replace(self, tokens=min(tokens, self.tokens))

    def newest(self, tokens: int) -> DenseSegment | None:
        """None: reading any token costs nothing here."""
        return None

    def dense_keys(self) -> torch.Tensor:
        """Every key in view: [B, Hkv, tokens, D]."""
        return self.sinks.keys[:, :, : self.tokens]

    def dense_values(self) -> torch.Tensor:
        """Every value in view: [B, Hkv, tokens, Dv]."""
        return self.sinks.values[:, :, : self.tokens]

    def select(self, entries: torch.Tensor) -> "DenseView":
        """The same of batch entries [B'] int64."""
        keys, values = (states.index_select(0, entries) for states in (self.sinks.keys, self.sinks.values))
        return replace(self, sinks=DenseSegment(keys, values))
