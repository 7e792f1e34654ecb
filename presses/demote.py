"""`Demote`: mixed precision instead of deletion.

Measured on SmolLM2-135M in float32: KL to the unquantized model in nats, 96 tokens behind each of two
contexts of 1280 tokens of a novel, and the bytes of the whole cache (its windows are float32).

    TurboQuant(3)                                        .0019   16.6 MB
    Demote(SnapKV(0.5), bits=2) | TurboQuant(4)          .0015   16.3 MB
    Demote(ExpectedAttention(0.5), bits=2) | ...(4)      .0010   16.3 MB
    SnapKV(0.25) | TurboQuant(4)                         .0031   13.6 MB

Two short texts show a direction, not a size.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantpress.cache.tokens.demotion import Demotion
from quantpress.presses.arguments import ScoresTokens
from quantpress.presses.base import WrappingPress
from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import import_kvpress
from quantpress.presses.turboquant import TurboQuant

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


def _snapkv() -> Any:
    return import_kvpress("SnapKV").SnapKV()


class Demote(WrappingPress, BasePress, inner=_snapkv, demotes=True, keeps_tokens=True):
    """Keeps every token, but packs those that a press would evict in fewer bits than the others.

    Put it last before TurboQuant in `Compose`. TurboQuant packs the other tokens, and its rotation, scales
    and windows apply to both. Sinks and recent tokens stay in 16 bits. The number of demoted tokens is
    rounded down to whole pages of 128. Each width has its own mean key and channel weights. Questions and
    answers are packed like the tokens that are not demoted.

    Args:
        press: scores tokens; its compression_ratio is the share to demote. ChunkKV takes whole chunks.
        bits: code width of keys and values of demoted tokens.
        key_bits: code width of their keys, if it differs.
        value_bits: code width of their values, if it differs.

    Raises:
        UnsupportedBitsError: a width cannot be stored.
        InvalidInputError: the press does not score tokens.

    Example:
        >>> from quantpress.presses import Compose, Knorm, TurboQuant
        >>> Compose([Demote(Knorm(0.75), bits=2), TurboQuant(bits=4)])
        Compose(Demote(Knorm(0.75)) | TurboQuant(4))
    """

    inner_kind = ScoresTokens
    bits: float = 2
    key_bits: float | None = None
    value_bits: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._scores: dict[int, torch.Tensor] = {}
        TurboQuant(self.bits, self.key_bits, self.value_bits)  # for its checks

    @property
    def compression_ratio(self) -> float:
        """Fraction of tokens evicted: 0. The share to demote is the compression_ratio of `press`."""
        return 0.0

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        raise AttributeError("Demote evicts nothing: set the compression_ratio of its press")

    def post_init_from_model(self, model: "PreTrainedModel") -> None:
        """Let the press look at the model."""
        self.press.post_init_from_model(model)

    def compress(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        attentions: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the tokens for the quantizer; keys and values are returned unchanged."""
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        self._scores[int(module.layer_idx)] = scores.detach()  # type: ignore[arg-type]
        return keys, values

    def __call__(self, model: "PreTrainedModel") -> Any:
        """Refused: by itself the press does nothing. `Compose` enters `scoring`.

        Raises:
            CompositionError: always.
        """
        return self.composition([self])(model)

    @contextmanager
    def scoring(self, model: "PreTrainedModel") -> Generator[None, None, None]:
        """Score the tokens of every prefill inside the context, for a quantizer that takes the scores."""
        try:
            with super().__call__(model):
                yield
        finally:
            self._scores.clear()

    def take_scores(self, layer_idx: int) -> torch.Tensor | None:
        """[B, Hkv, T] scores of a layer's tokens in the present prefill; gone afterwards."""
        return self._scores.pop(layer_idx, None)

    def demotion(
        self, quantizer: TurboQuant, module: nn.Module, scores: torch.Tensor, key_dim: int, value_dim: int
    ) -> Demotion | None:
        """The tokens of one layer to demote, and their codecs; None when there are none.

        Args:
            quantizer: packs the other tokens.
            module: the layer's attention module.
            scores: [B, Hkv, T], in the order in which the layer will store its tokens.
            key_dim: dimension D of its keys.
            value_dim: dimension Dv of its values.
        """
        tokens = int(scores.shape[2] * self.press.compression_ratio)
        coarse = replace(
            quantizer,
            bits=self.bits,
            key_bits=self.key_bits,
            value_bits=self.value_bits,
            layer_bits=None,
            plan=None,
        )
        settings = coarse.layer_settings(module, key_dim, value_dim, quantizer.sink_tokens)
        if settings is None or not tokens:
            return None
        return Demotion(scores, tokens, settings.key_codec, settings.value_codec)
