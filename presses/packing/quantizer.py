"""What packing asks of the presses that it works for: `TurboQuant`, and `Demote` in front of it."""

from typing import Any, Protocol

import torch
from torch import nn

from quantpress.cache.settings import LayerSettings
from quantpress.cache.tokens.demotion import Demotion


class Quantizer(Protocol):
    """A press that says how each layer is stored.

    Attributes:
        sink_tokens: first tokens of the text that are kept in 16 bits.
        detect_sinks: how many more sinks to find in each head.
        balance_window: how many of the last queries of the prefill the channel balance looks at.
    """

    sink_tokens: int
    detect_sinks: int
    balance_window: int

    def layer_settings(
        self, module: nn.Module, key_dim: int, value_dim: int, sink_tokens: int
    ) -> LayerSettings | None:
        """How the layer of an attention module is stored; None leaves it unpacked."""
        ...


class Demoter(Protocol):
    """A press that chooses tokens to be packed in fewer bits."""

    def take_scores(self, layer_idx: int) -> torch.Tensor | None:
        """[B, Hkv, T] scores of a layer's tokens in the present prefill; gone afterwards."""
        ...

    def demotion(
        self, quantizer: Any, module: nn.Module, scores: torch.Tensor, key_dim: int, value_dim: int
    ) -> Demotion | None:
        """The tokens of one layer to demote, and their codecs; None when there are none."""
        ...
