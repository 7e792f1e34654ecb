"""Which presses go together: what `Compose` checks when it is made.

An evictor thins out the cache, a quantizer stores what is left. kvpress's presses act at three different
times, and that decides what may stand beside them:

- in the hook of each layer, at the end of the prefill: most of them;
- when their context ends, on the complete cache of the context: `AT_EXIT`;
- again and again while decoding: `DECODING`. They assign a gather of what they keep to the cache, and a
  packed layer moves its codes (`PackedLayer.keep`). One that changes values on the way (CAM) would have them
  quantized a second time.

Head-wise presses (`HEAD_WISE`) remove nothing: they name slots that attention must not see. At the prefill a
quantizer behind them leaves those out (`quantpress.presses.packing.head_wise`).
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import kvpress
from kvpress import BasePress, ScorerPress

from quantpress.errors import CompositionError, QuantPressError
from quantpress.presses.demote import Demote
from quantpress.presses.piping import Pipeable
from quantpress.presses.turboquant import TurboQuant

AT_EXIT = (kvpress.KVzipPress, kvpress.FastKVzipPress, kvpress.KVComposePress)
"""KVzip's kind (KVgrad and RestoreKV are subclasses of it) and KVCompose."""

DECODING = (kvpress.DecodingPress, kvpress.PrefillDecodingPress)
"""DecodingPress's kind (CompressionRatioDecoding and CAM are subclasses of it).

Over packed layers the tokens stay in the order of the text, where kvpress leaves its unsorted top-k. So
scorers that go by place (SnapKV's window, StreamingLLM) see the recent tokens last, and equal scores may be
decided otherwise.
"""

RATIO_FOLLOWS = (
    kvpress.DMSPress,
    kvpress.DuoAttentionPress,
    kvpress.PerLayerCompressionPress,
    kvpress.SimLayerKVPress,
)
"""Their compression_ratio follows from other settings, and often from the text: it cannot be set."""

HEAD_WISE = (
    kvpress.AdaKVPress,
    kvpress.CriticalAdaKVPress,
    kvpress.DMSPress,
    kvpress.DuoAttentionPress,
    kvpress.FastKVzipPress,
    kvpress.KVzipPress,
    kvpress.LUKVPress,
)
"""They name slots in the module's `masked_key_indices` and leave the cache as it is."""

WHOLE_CONTEXT = (
    kvpress.BlockPress,
    kvpress.ChunkPress,
    kvpress.CompactorPress,
    kvpress.DMSPress,
    kvpress.KVzapPress,
    kvpress.LeverageScorePress,
    kvpress.NonCausalAttnPress,
    kvpress.ObservedAttentionPress,
)
"""They pair each key with the hidden state, or the attention, of its token: no token may be missing."""

_INNER = ("press", "base_press", "prefilling_press", "decoding_press")


def checked_presses(presses: Any) -> tuple[BasePress, ...]:
    """Make instances of classes, flatten what is composed already, and refuse what cannot work.

    Args:
        presses: press instances or classes.

    Returns:
        Evictors in order, then the quantizer if there is one.

    Raises:
        CompositionError: naming the press and what to do.
    """
    if isinstance(presses, (str, BasePress, type)) or not isinstance(presses, Iterable):
        raise CompositionError(f"Compose takes a list of presses, got {presses!r}; write Compose([...])")
    flat = tuple(member for press in presses for member in _flattened(_instance(press)))
    if not flat:
        raise CompositionError("Compose got an empty list; give at least one press, or press=None for none")
    for index, press in enumerate(flat):
        if any(press is earlier for earlier in flat[:index]):
            raise CompositionError(
                f"{name_of(press)} is given twice; make a second instance, or leave one out"
            )
    for press in flat:
        _check_complete(press)
    _check_quantizer(flat)
    _check_evictors([press for press in flat if not isinstance(press, TurboQuant)])
    return flat


def with_inner(press: BasePress) -> Iterator[BasePress]:
    """The press and every press that it works through."""
    yield press
    inner = [getattr(press, name, None) for name in _INNER]
    for member in (*inner, *getattr(press, "presses", ())):
        if isinstance(member, BasePress):
            yield from with_inner(member)


def name_of(press: BasePress) -> str:
    """Name of a press's class."""
    return type(press).__name__


def short_repr(press: Any) -> str:
    """A press as it would be written: its first argument, and those that differ from their defaults."""
    if not is_dataclass(press) or getattr(press, "flattens", False):
        return repr(press)
    parts = []
    for index, field in enumerate(field for field in fields(press) if field.init and field.repr):
        value = getattr(press, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown = short_repr(value) if isinstance(value, BasePress) else repr(value)
        if index == 0:
            parts.append(shown)
        elif value != default:
            parts.append(f"{field.name}={shown}")
    return f"{name_of(press)}({', '.join(parts)})"


def decodes(press: BasePress) -> bool:
    """Whether a press evicts while decoding."""
    return isinstance(press, DECODING) or (isinstance(press, kvpress.DMSPress) and press.decoding)


def rerotates(press: BasePress) -> bool:
    """Whether a press gives survivors consecutive positions, so that the next position is their count."""
    if isinstance(press, kvpress.FinchPress):
        return bool(press.rerotate_keys)
    return isinstance(press, kvpress.KeyRerotationPress)


def masks_heads(press: BasePress) -> bool:
    """Whether a press names slots that attention must not see instead of removing them."""
    if isinstance(press, kvpress.KVComposePress):
        return not press.structured
    return isinstance(press, HEAD_WISE)


def _instance(press: Any) -> BasePress:
    if isinstance(press, BasePress):
        return press
    if not (inspect.isclass(press) and issubclass(press, BasePress)):
        raise CompositionError(f"{press!r} is not a press; give an instance or a class, such as SnapKV(0.5)")
    try:
        made: BasePress = press()
    except QuantPressError:
        raise
    except (AssertionError, TypeError) as error:
        raise CompositionError(
            f"{press.__name__} has no defaults to be made of ({error}); give an instance of it"
        ) from error
    if press.__module__.startswith("kvpress.") and vars(made).get("compression_ratio") == 0:
        warnings.warn(
            f"{press.__name__} by default has compression_ratio 0 and evicts nothing; "
            f"give {press.__name__}(compression_ratio=0.5), or the class of this name in quantpress",
            stacklevel=4,
        )
    return made


def _flattened(press: BasePress) -> Iterator[BasePress]:
    if getattr(press, "flattens", False) or type(press) is kvpress.ComposedPress:
        for member in press.presses:
            yield from _flattened(member)
    elif type(press) is kvpress.PrefillDecodingPress and press.prefilling_press and not press.decoding_press:
        yield from _flattened(press.prefilling_press)  # nothing happens while decoding
    else:
        yield press


def _check_complete(press: BasePress) -> None:
    """Refuse kvpress's base classes, which fail only in the middle of a prefill."""
    for inner in with_inner(press):
        base, missing = (ScorerPress, "score") if isinstance(inner, ScorerPress) else (BasePress, "compress")
        if not _has_own(inner, base, missing, "compress", "forward_hook", "__call__"):
            raise CompositionError(
                f"{name_of(inner)} has no {missing} of its own and cannot evict anything; give a press that "
                "has, such as SnapKV"
            )


def _has_own(press: BasePress, base: type[BasePress], *names: str) -> bool:
    own = vars(press)
    inherited = {name: (getattr(base, name), getattr(Pipeable, name, None)) for name in names}
    return any(name in own or getattr(type(press), name) not in inherited[name] for name in names)


def _check_quantizer(presses: tuple[BasePress, ...]) -> None:
    quantizers = [press for press in presses if isinstance(press, TurboQuant)]
    for press in presses:
        if press not in quantizers and any(isinstance(inner, TurboQuant) for inner in with_inner(press)):
            raise CompositionError(f"{name_of(press)} wraps a quantizer; write Compose([..., TurboQuant()])")
    if not quantizers:
        demoting = next((press for press in presses if isinstance(press, Demote)), None)
        if demoting is not None:
            raise CompositionError(
                f"{name_of(demoting)} evicts nothing by itself; put TurboQuant() behind it"
            )
        return
    if len(quantizers) > 1:
        names = ", ".join(map(name_of, quantizers))
        raise CompositionError(
            f"there is more than one quantizer ({names}); a cache can be packed once, keep one"
        )
    position = next(index for index, press in enumerate(presses) if isinstance(press, TurboQuant))
    if position < len(presses) - 1:
        raise CompositionError(
            f"{name_of(presses[position])} comes before {name_of(presses[position + 1])}: evict first, "
            "quantize last. Move the quantizer to the end"
        )
    for press in presses[:-1]:
        if isinstance(press, AT_EXIT) and quantizers[0].detect_sinks:
            raise CompositionError(
                f"{name_of(press)} acts after the prefill, where sinks are detected; use detect_sinks=0"
            )
    _check_decoding(presses[:-1], quantizers[0])


def _check_decoding(evictors: tuple[BasePress, ...], quantizer: TurboQuant) -> None:
    """What presses that act while decoding cannot do over a packed cache."""
    inner = [member for press in evictors for member in with_inner(press)]
    merging = next((press for press in inner if isinstance(press, kvpress.CAMPress)), None)
    if merging is not None:
        raise CompositionError(
            f"{name_of(merging)} merges values while decoding, which a packed cache would quantize a second "
            f"time; use it without {name_of(quantizer)}, or DecodingPress, which only evicts"
        )
    moving = next((press for press in inner if moves_slots(press)), None)
    demoting = next((press for press in inner if isinstance(press, Demote)), None)
    if demoting is not None and any(map(decodes, inner)):
        acting = next(filter(decodes, inner))
        raise CompositionError(
            f"{name_of(demoting)} moves tokens of the cache, and {name_of(acting)} goes by their slots while "
            "decoding; use one of the two"
        )
    masking = next((press for press in _at_prefill(evictors) if masks_heads(press)), None)
    if moving is not None and masking is not None:
        raise CompositionError(
            f"{name_of(masking)} names slots of the cache, and {name_of(moving)} would move them while "
            "decoding; use one of the two"
        )
    if quantizer.detect_sinks and any(
        isinstance(press, kvpress.DMSPress) and press.decoding for press in inner
    ):
        raise CompositionError(
            "DMSPress counts slots on while decoding, and detected sinks move them; use detect_sinks=0"
        )


def moves_slots(press: BasePress) -> bool:
    """Whether a press removes tokens while decoding; around AdaKV it names slots instead."""
    return isinstance(press, kvpress.DecodingPress) and not isinstance(press.base_press, kvpress.AdaKVPress)


def _at_prefill(evictors: tuple[BasePress, ...]) -> Iterator[BasePress]:
    """The presses, and those inside them, that see the prefill."""
    for press in evictors:
        if isinstance(press, kvpress.PrefillDecodingPress):
            yield from with_inner(press.prefilling_press) if press.prefilling_press is not None else ()
        elif not isinstance(press, kvpress.DecodingPress):
            yield from with_inner(press)


def _check_evictors(evictors: list[BasePress]) -> None:
    shortened_by = None
    for index, press in enumerate(evictors):
        pairing = next((inner for inner in with_inner(press) if isinstance(inner, WHOLE_CONTEXT)), None)
        if shortened_by is not None and pairing is not None and not isinstance(press, kvpress.DecodingPress):
            raise CompositionError(
                f"{name_of(pairing)} scores each key with the hidden state of its token, and "
                f"{name_of(shortened_by)} before it evicts some; put {name_of(pairing)} first"
            )
        if not isinstance(press, (Demote, kvpress.ThinKPress, kvpress.DecodingPress)):
            shortened_by = press
        if isinstance(press, AT_EXIT) and len(evictors) > 1:
            raise CompositionError(
                f"{name_of(press)} acts on the complete cache of its context; use it as the only evictor"
            )
        if isinstance(press, Demote) and index < len(evictors) - 1:
            raise CompositionError(
                f"{name_of(press)} names slots of the cache, and {name_of(evictors[index + 1])} behind it "
                f"would move or hide them; put {name_of(press)} last before the quantizer"
            )
        if masks_heads(press) and index < len(evictors) - 1:
            raise CompositionError(
                f"{name_of(press)} names slots of the cache, and {name_of(evictors[index + 1])} behind it "
                f"would move them; put {name_of(press)} last among the evictors, and only one such press"
            )
