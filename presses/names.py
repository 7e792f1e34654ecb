"""kvpress's evicting presses under short names, with defaults that evict something.

Each is a subclass of kvpress's own class (`isinstance(SnapKV(), kvpress.SnapKVPress)`), which does the work
and documents the remaining arguments. kvpress's default ratio of 0 keeps everything; here it is 0.5. A
ratio outside 0 <= ratio < 1 raises `InvalidInputError`.

Presses that wrap another press are in `quantpress.presses.wrappers`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import kvpress

from quantpress.errors import InvalidInputError
from quantpress.presses.failures import NamedFailures
from quantpress.presses.piping import Pipeable

DEFAULT_RATIO = 0.5
"""Fraction of the tokens that a press evicts unless told otherwise."""


def check_ratio(owner: object, name: str, ratio: object) -> None:
    """Refuse a fraction to evict that is not a number with 0 <= ratio < 1.

    Raises:
        InvalidInputError: naming the press, the argument and the value.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise InvalidInputError(
            f"{type(owner).__name__}: {name} is {ratio!r}; give the fraction to evict, 0 <= {name} < 1"
        )


class EvictingPress(NamedFailures, Pipeable):
    """Checks the ratio with an exception before kvpress asserts it."""

    ratio_name: ClassVar[str] = "compression_ratio"

    def __post_init__(self) -> None:
        check_ratio(self, self.ratio_name, getattr(self, self.ratio_name))
        upstream = getattr(super(), "__post_init__", None)
        if upstream is not None:
            upstream()


class RereadingPress(EvictingPress):
    """A press that loads its model's tokenizer by the model's name."""

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """As kvpress's own context.

        Raises:
            InvalidInputError: there is no tokenizer of that name.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(super().__call__(model))
            except OSError as error:
                raise InvalidInputError(
                    f"{type(self).__name__} loads the tokenizer that has its model's name, and there is none "
                    f"of the name {model.config.name_or_path!r}: save the model and its tokenizer in one "
                    "folder and load them from there, or set model.config._name_or_path to it"
                ) from error
            yield


@dataclass
class Cap(EvictingPress, kvpress.CapPress):
    """Leverage of values, weighted by how queries so far align with the keys (CapKV)."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class Compactor(EvictingPress, kvpress.CompactorPress):
    """Leverage scores blended with non-causal attention (Compactor)."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class CUR(EvictingPress, kvpress.CURPress):
    """Approximate leverage scores of keys and values (CurDKV)."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class DuoAttention(EvictingPress, kvpress.DuoAttentionPress):
    """Some heads, `head_compression_ratio` of them, see only sinks and recent tokens (DuoAttention)."""

    ratio_name: ClassVar[str] = "head_compression_ratio"
    head_compression_ratio: float = DEFAULT_RATIO


@dataclass
class ExpectedAttention(EvictingPress, kvpress.ExpectedAttentionPress):
    """Attention that future queries are expected to pay."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class ExpectedAttentionStats(EvictingPress, kvpress.ExpectedAttentionStatsPress):
    """`ExpectedAttention` with query statistics from Hugging Face's hub, for some models."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class FastKVzip(EvictingPress, kvpress.FastKVzipPress):
    """Gates trained to predict KVzip's scores, from Hugging Face's hub, for some models."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class KeyDiff(EvictingPress, kvpress.KeyDiffPress):
    """Keeps keys that differ most from the mean key."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class Knorm(EvictingPress, kvpress.KnormPress):
    """Keeps keys of small norm."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class KVCompose(EvictingPress, kvpress.KVComposePress):
    """Composite tokens across heads, after reading the context twice (KVCompose)."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class KVgrad(RereadingPress, kvpress.KVgradPress):
    """Input times gradient of the model reading its context again."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class KVzap(EvictingPress, kvpress.KVzapPress):
    """A small trained model that predicts KVzip's scores, from Hugging Face's hub, for some models."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class KVzip(RereadingPress, kvpress.KVzipPress):
    """Attention of the model repeating its context (KVzip); two to three times the prefill's cost."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class LagKV(EvictingPress, kvpress.LagKVPress):
    """Keys and values compared with those of the partition that follows."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class LeverageScore(EvictingPress, kvpress.LeverageScorePress):
    """Approximate leverage scores of keys before RoPE."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class NonCausalAttn(EvictingPress, kvpress.NonCausalAttnPress):
    """Attention of all queries of a chunk to all its keys."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class ObservedAttention(EvictingPress, kvpress.ObservedAttentionPress):
    """Attention that each token received in the prefill (H2O); needs attn_implementation="eager"."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class PyramidKV(EvictingPress, kvpress.PyramidKVPress):
    """SnapKV with more tokens in lower layers."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class QFilter(EvictingPress, kvpress.QFilterPress):
    """Learned query directions, from Hugging Face's hub, for some models."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class Random(EvictingPress, kvpress.RandomPress):
    """Random tokens: the baseline."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class RestoreKV(RereadingPress, kvpress.RestoreKVPress):
    """KVzip with learned restore tokens, from Hugging Face's hub, for some models."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class SimLayerKV(EvictingPress, kvpress.SimLayerKVPress):
    """Only sinks and recent tokens in layers whose attention to them is above `lazy_threshold`."""

    ratio_name: ClassVar[str] = "lazy_threshold"
    lazy_threshold: float = 0.9


@dataclass
class SnapKV(EvictingPress, kvpress.SnapKVPress):
    """Keeps what the last tokens of the context attend to."""

    compression_ratio: float = DEFAULT_RATIO


@dataclass
class StreamingLLM(EvictingPress, kvpress.StreamingLLMPress):
    """Keeps the first `n_sink` tokens and the most recent ones.

    With a quantizer behind it in `Compose`, those first tokens stay in 16 bits.
    """

    compression_ratio: float = DEFAULT_RATIO
    n_sink: int = 4


@dataclass
class ThinK(EvictingPress, kvpress.ThinKPress):
    """Zeroes the key channels that recent queries use least; evicts no token, saves no memory by itself."""

    ratio_name: ClassVar[str] = "key_channel_compression_ratio"
    key_channel_compression_ratio: float = DEFAULT_RATIO


@dataclass
class TOVA(EvictingPress, kvpress.TOVAPress):
    """Keeps what the last token attends to."""

    compression_ratio: float = DEFAULT_RATIO
