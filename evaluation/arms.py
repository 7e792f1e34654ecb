"""The arms of an evaluation: ways to keep a cache that are compared.

Every run has the controls: the uncompressed cache, FP8, plain integers, those behind a rotation, KIVI's
scheme, random eviction and kvpress's presses alone. All of them really hold their cache in that form; nothing
is simulated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from quantpress.cache.settings import DEFAULT_SINK_TOKENS
from quantpress.codecs.block_hadamard import BlockHadamardPages
from quantpress.codecs.fp8 import Fp8Pages
from quantpress.codecs.protocol import PageCodec
from quantpress.codecs.uniform import UniformPages
from quantpress.errors import InvalidInputError
from quantpress.presses import Compose, ExpectedAttention, Knorm, Random, SnapKV, StreamingLLM, TurboQuant
from quantpress.presses.base_press import BasePress
from quantpress.presses.presets import WINDOWS
from quantpress.presses.turboquant import CodecFactory

UNCOMPRESSED = "uncompressed"
KIVI_GROUP = 32
"""Numbers in a group, keys along tokens and values along channels. Source: KIVI, arXiv 2402.02750."""
KIVI_RESIDUAL = 128
"""Last tokens that KIVI keeps in 16 bits."""

MakePress = Callable[[], BasePress | None]


@dataclass(frozen=True)
class Arm:
    """One way to keep a cache.

    Args:
        name: name in tables and records, unique in a run.
        make: makes a fresh press for every reading, or None to keep the cache as it is.
        kind: "control", "eviction", "quantizer", "combined", "grid" or "yours".
        one_by_one: whether documents are read one at a time, because the press takes no batch.
    """

    name: str
    make: MakePress
    kind: str
    one_by_one: bool = field(default=False, kw_only=True)


def check_names(arms: Sequence[Arm]) -> None:
    """Refuse two arms of one name, and arms without the uncompressed one.

    Raises:
        InvalidInputError: two arms have the same name, or none is called `UNCOMPRESSED`.
    """
    names = [arm.name for arm in arms]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidInputError(f"two arms are called {twice[0]!r}; give each its own name")
    if UNCOMPRESSED not in names:
        raise InvalidInputError(f"the arms have no {UNCOMPRESSED!r}; everything is measured against it")


def uncompressed() -> Arm:
    """The whole cache, as the model makes it."""
    return Arm(UNCOMPRESSED, lambda: None, "control")


def plain_integers(bits: int) -> TurboQuant:
    """Plain integers of `bits` bits, one range for each token and head, without pinned tokens or rotation."""
    return _without_windows(lambda head_dim, role, layer_idx: UniformPages(head_dim, bits))


def fp8() -> TurboQuant:
    """FP8 (e4m3) with one scale for a tensor, 1.0, without pinned tokens: as vLLM stores it uncalibrated."""
    return _without_windows(lambda head_dim, role, layer_idx: Fp8Pages(head_dim))


def block_hadamard(bits: int = 4) -> TurboQuant:
    """SAW-INT4's scheme: keys are rotated in blocks, values are not; then one range for each token and head.

    Blocks have 128 channels, or the largest power of two that divides the head_dim where that is less.

    Source: SAW-INT4, arXiv 2604.19157. The README of its code measures keys alone, in blocks of 128; rotated
    values and other blocks are options.
    """

    def codec(head_dim: int, role: str, layer_idx: int) -> PageCodec:
        return BlockHadamardPages(head_dim, bits) if role == "key" else UniformPages(head_dim, bits)

    return _without_windows(codec)


def _without_windows(codec: CodecFactory) -> TurboQuant:
    return TurboQuant(codec=codec, sink_tokens=0, recent_tokens=0)


def kivi(bits: int) -> TurboQuant:
    """KIVI's scheme: keys per channel, values per token, groups of 32, the last 128 tokens in 16 bits.

    Source: KIVI, arXiv 2402.02750.
    """

    def codec(head_dim: int, role: str, layer_idx: int) -> PageCodec:
        return UniformPages(head_dim, bits, "channel" if role == "key" else "token", KIVI_GROUP)

    return TurboQuant(codec=codec, sink_tokens=0, recent_tokens=KIVI_RESIDUAL)


def codec_arm(name: str, codec: CodecFactory, **options: Any) -> Arm:
    """An arm that packs the cache with a codec of yours.

    Args:
        name: what tables and records call it.
        codec: makes the codec of (head_dim, "key" or "value", layer index).
        options: other fields of `TurboQuant`, such as its windows.
    """
    return Arm(name, partial(TurboQuant, codec=codec, **options), "yours")


def controls() -> list[Arm]:
    """The arms of every run."""
    return [
        uncompressed(),
        Arm("FP8 per tensor", fp8, "control"),
        Arm("int8 per token", lambda: plain_integers(8), "control"),
        Arm("int4 per token", lambda: plain_integers(4), "control"),
        Arm("int4, block Hadamard", block_hadamard, "control"),
        Arm("KIVI 4 bits", lambda: kivi(4), "control"),
        Arm("KIVI 2 bits", lambda: kivi(2), "control"),
        Arm("Random(0.5)", lambda: Random(0.5, seed=0), "control"),
    ]


def evictions() -> list[Arm]:
    """kvpress's presses alone."""
    return [
        Arm("SnapKV(0.5)", lambda: SnapKV(0.5), "eviction"),
        Arm("StreamingLLM(0.5)", lambda: StreamingLLM(0.5), "eviction"),
        Arm("Knorm(0.5)", lambda: Knorm(0.5), "eviction"),
        Arm("ExpectedAttention(0.5)", lambda: ExpectedAttention(0.5), "eviction"),
    ]


def quantizers() -> list[Arm]:
    """TurboQuant by its presets and widths, and as published at the same true bits.

    The first ones have the windows of the presets in 16 bits: 4 first and 8 detected tokens of each head and
    64 recent ones; TurboQuant as published has 12 first ones, the same number. The last ones have the windows
    of `TurboQuant()`.
    """
    small, paper = partial(TurboQuant.preset, "small"), partial(TurboQuant.preset, "paper")
    same = {
        "sink_tokens": DEFAULT_SINK_TOKENS + WINDOWS["detect_sinks"],
        "recent_tokens": WINDOWS["recent_tokens"],
    }
    makes: dict[str, Callable[[], TurboQuant]] = {
        "preset quality": partial(TurboQuant.preset, "quality"),
        "preset balanced": partial(TurboQuant.preset, "balanced"),
        "preset small, keys 4 bits": partial(small, key_bits=4),
        "preset small": small,
        "preset small, 2 bits": partial(small, bits=2),
        "as published 4/4": partial(paper, bits=4, **same),
        "as published 3.5": partial(paper, bits=3.5, **same),
        "as published 3/3": partial(paper, bits=3, **same),
        "TurboQuant 4/4": partial(TurboQuant, 4),
        "TurboQuant 3.5": partial(TurboQuant, 3.5),
        "TurboQuant 3/3": partial(TurboQuant, 3),
        "as published 3.5, 128 recent": partial(paper, bits=3.5),
        "as published 3/3, 128 recent": partial(paper, bits=3),
    }
    return [Arm(name, make, "quantizer") for name, make in makes.items()]


AGAINST_PUBLISHED = {
    "preset balanced": "as published 4/4",
    "preset small, keys 4 bits": "as published 3.5",
    "preset small": "as published 3/3",
    "TurboQuant 3.5": "as published 3.5, 128 recent",
    "TurboQuant 3/3": "as published 3/3, 128 recent",
}
"""Arms, each with TurboQuant as published at the same number of bits."""


def combined() -> list[Arm]:
    """Eviction, then packing."""
    return [
        Arm(f"SnapKV(0.5) | preset {name}", partial(_behind_snapkv, name), "combined")
        for name in ("balanced", "small")
    ]


def _behind_snapkv(preset: str) -> Compose:
    return Compose([SnapKV(0.5), TurboQuant.preset(preset)])


def every_arm() -> list[Arm]:
    """Controls, presses alone, quantizers and compositions."""
    return [*controls(), *evictions(), *quantizers(), *combined()]
