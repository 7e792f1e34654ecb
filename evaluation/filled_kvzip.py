"""KVzip within a number of bytes.

KVzip ranks the tokens of all heads together, so heads keep different numbers of them, in pages of their own,
the last of which is partly filled. No ratio has the same bytes in every text; it is searched for in each.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
from torch import nn
from transformers import PreTrainedModel

from quantpress.cache.memory_estimate import head_wise_bytes
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.raw import RawPages
from quantpress.presses import Compose, KVzip, TurboQuant
from quantpress.presses.models.attention import full_attention_modules

STEPS = 12
"""Halvings of the interval of ratios; the last interval is 1/4096."""


@dataclass
class FilledKVzip(KVzip):
    """KVzip with the least ratio whose bytes, packed head by head, are at most `budget_bytes`.

    Args:
        compression_ratio: set when a context is compressed.
        budget_bytes: most bytes of the packed cache.
        quantizer: what packs it.
    """

    budget_bytes: float = field(default=0.0, kw_only=True)
    quantizer: TurboQuant = field(default_factory=TurboQuant, kw_only=True)

    def __post_init__(self) -> None:
        log = logging.getLogger(kvpress.KVzipPress.__module__)
        was, log.disabled = log.disabled, True  # it warns of its cost each time one is made
        try:
            super().__post_init__()
        finally:
            log.disabled = was

    def compress_post(self, model: PreTrainedModel) -> None:
        """Name the slots to evict, at the ratio that fills the budget."""
        low, high = 0.0, 1.0
        for _ in range(STEPS):
            self.compression_ratio = (low + high) / 2
            super().compress_post(model)
            if self._bytes(model) > self.budget_bytes:
                low = self.compression_ratio
            else:
                high = self.compression_ratio
        self.compression_ratio = min(high, 1 - 2.0**-STEPS)
        super().compress_post(model)

    def _bytes(self, model: PreTrainedModel) -> int:
        """Bytes of the slots that are not named now."""
        return sum(
            head_wise_bytes(self._settings(module), self._hidden(module), dtype=model.dtype)
            for module in full_attention_modules(model)
        )

    def _settings(self, module: nn.Module) -> LayerSettings:
        dim = int(module.head_dim)  # type: ignore[arg-type]
        settings = self.quantizer.layer_settings(module, dim, dim, self.quantizer.sink_tokens)
        assert settings is not None
        return settings

    def _hidden(self, module: Any) -> torch.Tensor:
        """[1, Hkv, T] bool, on the CPU, where kvpress keeps the names of slots."""
        hidden = torch.zeros(self.score_val.shape[1:], dtype=torch.bool, device="cpu")
        hidden[tuple(index.cpu() for index in module.masked_key_indices)] = True
        return hidden


def filled_kvzip(budget_bytes: float, quantizer: TurboQuant | None) -> Compose:
    """KVzip, then packing, within a number of bytes for a context.

    Args:
        budget_bytes: most bytes of the packed cache.
        quantizer: what packs; None keeps numbers in the model's own dtype, in the same ragged pages.
    """
    packed = quantizer or TurboQuant(
        codec=lambda head_dim, role, layer_idx: RawPages(head_dim), sink_tokens=0, recent_tokens=0
    )
    return Compose([FilledKVzip(0.5, budget_bytes=budget_bytes, quantizer=packed), packed])
