"""Arms of equal bytes: n tokens in 16 bits, about 4n in 4, 5n in 3 or 7n in 2.

Tokens that are not packed have the model's own dtype: 16 bits, or 32 in a model that runs in float32. For
each budget, press and width, a ratio is found at which evicting and packing leaves as many bytes as the
budget allows; for KVzip it is found in each text, because its heads keep different numbers of tokens. Records
hold the bytes that were then measured.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import isclose
from types import MappingProxyType

import torch
from transformers import PreTrainedConfig

from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.codecs.turboquant import TurboQuantCodec
from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import Arm, MakePress
from quantpress.evaluation.filled_kvzip import filled_kvzip
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses import Compose, ExpectedAttention, KeyDiff, Knorm, SnapKV, StreamingLLM, TurboQuant
from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import members, name_of, traits_of

MakeEvictor = Callable[[float], BasePress]
"""Makes a fresh press that evicts a given fraction of the tokens."""

PRESSES: dict[str, MakeEvictor] = {
    "StreamingLLM": StreamingLLM,
    "SnapKV": SnapKV,
    "Knorm": Knorm,
    "ExpectedAttention": ExpectedAttention,
    "KeyDiff": KeyDiff,
}
HEAD_WISE = "KVzip"
"""Reads the context twice and chooses tokens head by head, one text at a time."""
GRID_PRESSES = (*PRESSES, HEAD_WISE)
RECENT_TOKENS = 32
"""Recent tokens of the packed arms; few, because at small budgets they would be most of the bytes."""
DETECTED_SINKS = 8
"""Detected sinks of each head; none after KVzip, which acts when sinks can no longer be detected."""
DENSE_BITS = 16
"""The width that stands for "not packed, in the model's own dtype"."""
EVERY_TOKEN = "every token"
"""The press that stands for "none", where the budget holds the whole context."""


@dataclass(frozen=True)
class Shape:
    """What a cache's bytes depend on.

    Args:
        layers, kv_heads, head_dim: shape of the model.
        context: number of tokens that are read.
        dtype: dtype of the keys and values that the model computes.
    """

    layers: int
    kv_heads: int
    head_dim: int
    context: int
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, config: PreTrainedConfig, context: int, dtype: torch.dtype = torch.bfloat16) -> "Shape":
        """The shape of a model's cache after `context` tokens."""
        text = config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(text.num_hidden_layers, heads, dim, context, dtype)

    def bytes(self, tokens: int, bits: int) -> int:
        """Bytes of `tokens` tokens in `bits` bits, with sinks, recent tokens and metadata."""
        if bits == DENSE_BITS:
            return tokens * self.layers * self.kv_heads * self.head_dim * 2 * self.dtype.itemsize
        sinks = DEFAULT_SINK_TOKENS
        if tokens >= sinks + DETECTED_SINKS + RECENT_TOKENS + PAGE_TOKENS:  # fewer are packed without
            sinks += DETECTED_SINKS
        codec = TurboQuantCodec(self.head_dim, bits)
        counts = (tokens, self.layers, self.kv_heads, sinks, RECENT_TOKENS)
        return codec.memory_report(*counts, dtype=self.dtype).total_bytes

    def width(self, bits: int) -> int:
        """Bits of a number in the arms of width `bits`."""
        return 8 * self.dtype.itemsize if bits == DENSE_BITS else bits

    def tokens(self, budget: float, bits: int) -> int:
        """The most tokens whose bytes are at most `budget` of the whole context's, uncompressed.

        Raises:
            InvalidInputError: not even one token fits.
        """
        allowed = budget * self.bytes(self.context, DENSE_BITS)
        for tokens in range(self.context, 0, -1):  # pages make the bytes rise and fall
            if self.bytes(tokens, bits) <= allowed:
                return tokens
        raise InvalidInputError(
            f"{budget:g} of the bytes of {self.context} tokens hold no token of {bits} bits; give a larger "
            "budget or a longer context"
        )


@dataclass(frozen=True)
class GridArm(Arm):
    """An arm of the grid.

    Args:
        press: name of the evictor, or `EVERY_TOKEN`.
        bits: width of what is kept; 16 is not packed, whatever the model's dtype.
        budget: bytes allowed, as a share of the whole context's, uncompressed.
        tokens: tokens kept in every head; KVzip's heads keep about as many on average.
    """

    press: str
    bits: int
    budget: float
    tokens: int


def evictor(press: BasePress) -> MakeEvictor:
    """A press of one's own for the grid: copies of it that evict as much as the budget asks for.

    Args:
        press: evicts at the prefill; its `compression_ratio` is the fraction of the tokens that it removes.

    Raises:
        InvalidInputError: the press quantizes, or its ratio cannot be set.

    Example:
        >>> evictor(SnapKV(window_size=8))(0.25)
        SnapKV(compression_ratio=0.25, window_size=8, kernel_size=5)
    """
    traits = [traits_of(one) for one in members(press)]
    if any(one.quantizes for one in traits):
        raise InvalidInputError(
            f"{press!r} quantizes, which the grid does itself; give the press that evicts"
        )

    def make(ratio: float) -> BasePress:
        made = deepcopy(press)
        made.compression_ratio = ratio
        return made

    try:
        settable = hasattr(press, "compression_ratio") and isclose(make(0.5).compression_ratio, 0.5)
    except (AttributeError, AssertionError, ValueError):
        settable = False
    if not settable or any(one.ratio_follows for one in traits):
        raise InvalidInputError(
            f"{name_of(press)} has no compression_ratio that can be set, so that it cannot fill a budget"
        )
    return make


def grid_arms(
    shape: Shape,
    presses: Sequence[str],
    widths: Sequence[int],
    budgets: Sequence[float],
    own: Mapping[str, MakeEvictor] = MappingProxyType({}),
) -> list[GridArm]:
    """One arm for each press, width and budget; one for all presses where every token fits.

    Args:
        shape: shape of the cache.
        presses: names from `GRID_PRESSES`, or from `own`.
        widths: bits; 16 for no packing.
        budgets: shares of the whole context's bytes, uncompressed.
        own: presses of one's own by name (`evictor`). Each must keep as many tokens in every head, or its
            bytes are off the budget, which the report says.

    Raises:
        InvalidInputError: a press is neither in `GRID_PRESSES` nor in `own`, or a budget holds no token.
    """
    evictors = {**PRESSES, **own}
    unknown = [name for name in presses if name not in (*evictors, HEAD_WISE)]
    if unknown:
        known = ", ".join({**dict.fromkeys(GRID_PRESSES), **own})
        raise InvalidInputError(f"the grid has no press {unknown[0]!r}; use some of {known}")
    arms: dict[str, GridArm] = {}
    for budget in budgets:
        for bits in widths:
            tokens = shape.tokens(budget, bits)
            whole = tokens == shape.context
            for press in (EVERY_TOKEN,) if whole else presses:
                width = f"{shape.width(bits)} bits"
                name = f"{press}, {width}" if whole else f"{press}, {tokens} tokens, {width}"
                make: MakePress = partial(_press, evictors.get(press), bits, tokens, shape.context)
                head_wise = press == HEAD_WISE and press not in own
                if head_wise:
                    name = f"{press} within {budget:g}, {width}"
                    allowed = budget * shape.bytes(shape.context, DENSE_BITS)
                    make = partial(filled_kvzip, allowed, _quantizer(bits, 0))
                arm = GridArm(name, make, "grid", press, bits, budget, tokens, one_by_one=head_wise)
                arms.setdefault(name, arm)
    return list(arms.values())


def _press(make: MakeEvictor | None, bits: int, tokens: int, context: int) -> BasePress | None:
    """The press that leaves `tokens` of `context` tokens in `bits` bits."""
    evicting = None
    if make is not None and tokens < context:  # kvpress keeps int(context * (1 - ratio))
        evicting = make(1 - (tokens + 0.5) / context)
    quantizer = _quantizer(bits)
    if evicting is None or quantizer is None:
        return evicting or quantizer
    return Compose([evicting, quantizer])


def _quantizer(bits: int, detect_sinks: int = DETECTED_SINKS) -> TurboQuant | None:
    if bits == DENSE_BITS:
        return None
    return TurboQuant(bits=bits, recent_tokens=RECENT_TOKENS, detect_sinks=detect_sinks)
