"""kvpress's presses that work through another press, under short names.

Those with a natural inner press have it as their default, so that the class alone can be given to
`Compose`. The inner press may be given as an instance or as a class. The others are kvpress's own classes.
"""

from dataclasses import dataclass, field
from typing import Any

import kvpress
from kvpress import ScorerPress

from quantpress.errors import InvalidInputError
from quantpress.presses.failures import NamedFailures
from quantpress.presses.names import (
    DEFAULT_RATIO,
    ExpectedAttention,
    KeyDiff,
    SnapKV,
    StreamingLLM,
    check_ratio,
)
from quantpress.presses.piping import Pipeable

CAM = kvpress.CAMPress
CompressionRatioDecoding = kvpress.CompressionRatioDecodingPress
Decoding = kvpress.DecodingPress
DMS = kvpress.DMSPress
PerLayerCompression = kvpress.PerLayerCompressionPress
PrefillDecoding = kvpress.PrefillDecodingPress


def _inner_press(owner: object, press: Any) -> ScorerPress:
    press = press() if isinstance(press, type) and issubclass(press, ScorerPress) else press
    if not isinstance(press, ScorerPress):
        raise InvalidInputError(
            f"{type(owner).__name__}: press is {press!r}; give one that scores tokens, such as SnapKV(0.5)"
        )
    return press


class WrappingPress(NamedFailures, Pipeable):
    """Checks the inner press with an exception before kvpress asserts it."""

    press: ScorerPress

    def __post_init__(self) -> None:
        self.press = _inner_press(self, self.press)
        upstream = getattr(super(), "__post_init__", None)
        if upstream is not None:
            upstream()


@dataclass
class AdaKV(WrappingPress, kvpress.AdaKVPress):
    """Shares the budget of a layer among its heads by score. Tokens are hidden; a quantizer frees them."""

    press: ScorerPress = field(default_factory=SnapKV)


@dataclass
class Block(WrappingPress, kvpress.BlockPress):
    """Evicts block by block; with KeyDiff the method of the KeyDiff paper."""

    press: ScorerPress = field(default_factory=KeyDiff)


@dataclass
class Chunk(WrappingPress, kvpress.ChunkPress):
    """Evicts the same fraction of every chunk."""

    press: ScorerPress = field(default_factory=SnapKV)


@dataclass
class ChunkKV(WrappingPress, kvpress.ChunkKVPress):
    """Keeps or evicts chunks as a whole."""

    press: ScorerPress = field(default_factory=SnapKV)


@dataclass
class CriticalAdaKV(WrappingPress, kvpress.CriticalAdaKVPress):
    """AdaKV with CriticalKV's scores. Tokens are hidden; a quantizer frees them."""

    press: ScorerPress = field(default_factory=SnapKV)


class CriticalKV(NamedFailures, Pipeable, kvpress.CriticalKVPress):
    """Scores times the size of the projected values, in two stages."""

    def __init__(
        self, press: ScorerPress | None = None, epsilon: float = 1e-4, first_stage_ratio: float = 0.5
    ) -> None:
        press = SnapKV() if press is None else _inner_press(self, press)
        super().__init__(press, epsilon=epsilon, first_stage_ratio=first_stage_ratio)


@dataclass
class EntropyGatedChunkKV(WrappingPress, kvpress.EntropyGatedChunkKVPress):
    """ChunkKV that keeps only the best tokens of chunks with a single peak."""

    press: ScorerPress = field(default_factory=SnapKV)


@dataclass
class KeyRerotation(WrappingPress, kvpress.KeyRerotationPress):
    """Gives survivors consecutive positions; with StreamingLLM the method of its paper."""

    press: ScorerPress = field(default_factory=StreamingLLM)


@dataclass
class LUKV(WrappingPress, kvpress.LUKVPress):
    """Budgets per head from measured curves, for some models. Tokens are hidden; a quantizer frees them."""

    press: ScorerPress = field(default_factory=lambda: ExpectedAttention(epsilon=2e-2))
    compression_ratio: float = DEFAULT_RATIO

    def __post_init__(self) -> None:
        check_ratio(self, "compression_ratio", self.compression_ratio)
        super().__post_init__()


@dataclass
class Merging(WrappingPress, kvpress.MergingPress):
    """Folds evicted values into their most similar survivors."""

    press: ScorerPress = field(default_factory=SnapKV)
