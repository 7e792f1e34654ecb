"""At the same bytes: n tokens in 16 bits, 4n in 4, 5n in 3 or 7n in 2?

Tokens that are not packed have the model's own dtype: 16 bits, or 32 in a model that runs in float32.
For each budget, press and width, a ratio is found with which evicting and packing leaves as many bytes as the
budget allows; KVzip's in each text, since its heads keep different numbers of tokens. Records hold the bytes
that were then measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from kvpress import BasePress
from transformers import PreTrainedConfig

from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.codecs.turboquant import TurboQuantCodec
from quantpress.errors import InvalidInputError
from quantpress.evaluation.arms import Arm, MakePress
from quantpress.evaluation.filled_kvzip import filled_kvzip
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses import Compose, ExpectedAttention, KeyDiff, Knorm, SnapKV, StreamingLLM, TurboQuant

PRESSES = {
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
"""Of the packed arms; few, since at small budgets they would be most of the bytes."""
DETECTED_SINKS = 8
"""Of each head, but behind KVzip, which acts after sinks could be detected."""
DENSE_BITS = 16
"""In place of a width: not packed, in the model's own dtype."""
EVERY_TOKEN = "every token"
"""In place of a press, where the budget holds the whole context."""


@dataclass(frozen=True)
class Shape:
    """What a cache's bytes depend on.

    Args:
        layers, kv_heads, head_dim: of the model.
        context: tokens that are read.
        dtype: of the keys and values that the model computes.
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
        """What `tokens` tokens take in `bits` bits, sinks, recent tokens and metadata included."""
        if bits == DENSE_BITS:
            return tokens * self.layers * self.kv_heads * self.head_dim * 2 * self.dtype.itemsize
        sinks = DEFAULT_SINK_TOKENS
        if tokens >= sinks + DETECTED_SINKS + RECENT_TOKENS + PAGE_TOKENS:  # fewer are packed without
            sinks += DETECTED_SINKS
        codec = TurboQuantCodec(self.head_dim, bits)
        counts = (tokens, self.layers, self.kv_heads, sinks, RECENT_TOKENS)
        return codec.memory_report(*counts, dtype=self.dtype).total_bytes

    def width(self, bits: int) -> int:
        """Bits that a number has in the rows of `bits`."""
        return 8 * self.dtype.itemsize if bits == DENSE_BITS else bits

    def tokens(self, budget: float, bits: int) -> int:
        """The most tokens whose bytes are at most `budget` of the whole context's, uncompressed.

        Raises:
            InvalidInputError: not even one token fits.
        """
        room = budget * self.bytes(self.context, DENSE_BITS)
        for tokens in range(self.context, 0, -1):  # pages make the bytes rise and fall
            if self.bytes(tokens, bits) <= room:
                return tokens
        raise InvalidInputError(
            f"{budget:g} of the bytes of {self.context} tokens hold no token of {bits} bits; give a larger "
            "budget or a longer context"
        )


@dataclass(frozen=True)
class GridArm(Arm):
    """An arm of the grid.

    Args:
        press: the evictor's name, or `EVERY_TOKEN`.
        bits: the width of what is kept; 16 is not packed, whatever the model's dtype.
        budget: bytes allowed, as a part of the whole context's, uncompressed.
        tokens: kept, in every head alike; KVzip's heads keep about as many, each its own number.
    """

    press: str
    bits: int
    budget: float
    tokens: int


def grid_arms(
    shape: Shape, presses: Sequence[str], widths: Sequence[int], budgets: Sequence[float]
) -> list[GridArm]:
    """One arm for each press, width and budget; one for all presses where nothing has to go.

    Args:
        shape: of the cache.
        presses: names out of `GRID_PRESSES`.
        widths: bits, 16 for no packing.
        budgets: parts of the whole context's bytes, uncompressed.

    Raises:
        InvalidInputError: a press that is not in `GRID_PRESSES`, or a budget that holds no token.
    """
    unknown = [name for name in presses if name not in GRID_PRESSES]
    if unknown:
        raise InvalidInputError(
            f"the grid has no press {unknown[0]!r}; use some of {', '.join(GRID_PRESSES)}"
        )
    arms: dict[str, GridArm] = {}
    for budget in budgets:
        for bits in widths:
            tokens = shape.tokens(budget, bits)
            whole = tokens == shape.context
            for press in (EVERY_TOKEN,) if whole else presses:
                width = f"{shape.width(bits)} bits"
                name = f"{press}, {width}" if whole else f"{press}, {tokens} tokens, {width}"
                make: MakePress = partial(make_press, press, bits, tokens, shape.context)
                if press == HEAD_WISE:
                    name = f"{press} within {budget:g}, {width}"
                    room = budget * shape.bytes(shape.context, DENSE_BITS)
                    make = partial(filled_kvzip, room, _quantizer(bits, 0))
                arm = GridArm(name, make, "grid", press, bits, budget, tokens, one_by_one=press == HEAD_WISE)
                arms.setdefault(name, arm)
    return list(arms.values())


def make_press(name: str, bits: int, tokens: int, context: int) -> BasePress | None:
    """The press that leaves `tokens` of `context` tokens in `bits` bits."""
    evictor = None
    if tokens < context:  # kvpress keeps int(context * (1 - ratio))
        evictor = PRESSES[name](1 - (tokens + 0.5) / context)
    quantizer = _quantizer(bits)
    if evictor is None or quantizer is None:
        return evictor or quantizer
    return Compose([evictor, quantizer])


def _quantizer(bits: int, detect_sinks: int = DETECTED_SINKS) -> TurboQuant | None:
    if bits == DENSE_BITS:
        return None
    return TurboQuant(bits=bits, recent_tokens=RECENT_TOKENS, detect_sinks=detect_sinks)
