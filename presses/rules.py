"""Which presses may stand together: every rule, and `why_not`, which applies them.

An evictor thins out the cache, a quantizer stores what is left. Presses act at three different times, and
that decides what may stand beside them:

- in the hook of each layer, at the end of the prefill: most of them;
- when their context ends, on the complete cache of the context (`at_exit`);
- again and again while decoding (`decodes`). They assign a gather of what they keep to the cache, and a
  packed layer moves its codes (`PackedLayer.keep`). One that changes values on the way (CAM) would have them
  quantized a second time.

Head-wise presses (`masks_heads`) remove nothing: they name slots that attention must not see. At the prefill
a quantizer behind them leaves those out (`quantpress.presses.packing.head_wise`).
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from quantpress.presses.base import PressMixin
from quantpress.presses.base_press import BasePress, ScorerPress, is_base
from quantpress.presses.traits import name_of, traits_of, with_inner
from quantpress.rule import Found, Rule, reasons


def why_not(presses: Sequence[BasePress]) -> list[str]:
    """Every reason why presses cannot be applied one after the other; empty when they can.

    Args:
        presses: in order, none of them a composition.

    Example:
        >>> from kvpress import KnormPress
        >>> press = KnormPress(0.5)
        >>> why_not([press, press])
        ['KnormPress is given twice; make a second instance, or leave one out']
    """
    return reasons(RULES, _Stack(presses))


class _Stack:
    """The presses that the rules look at.

    Attributes:
        presses: all, in order.
        quantizers, evictors: those that pack the cache, and all others.
        inner: the evictors and every press inside them.
        at_prefill: those of `inner` that act at the prefill.
        detects_sinks: whether a quantizer looks for attention sinks, which moves tokens.
    """

    def __init__(self, presses: Sequence[BasePress]) -> None:
        self.presses = presses
        self.quantizers = [press for press in presses if traits_of(press).quantizes]
        self.evictors = [press for press in presses if not traits_of(press).quantizes]
        self.inner = [inner for press in self.evictors for inner in with_inner(press)]
        self.at_prefill = [one for press in self.evictors for one in with_inner(press, at_prefill=True)]
        self.detects_sinks = any(getattr(press, "detect_sinks", 0) for press in self.quantizers)


def _twice(stack: _Stack) -> Found:
    earlier: set[int] = set()
    for press in stack.presses:
        if id(press) in earlier:
            return {"press": name_of(press)}
        earlier.add(id(press))
    return None


def _incomplete(stack: _Stack) -> Found:
    """Base classes fail only in the middle of a prefill."""
    for press in (inner for outer in stack.presses for inner in with_inner(outer)):
        missing = "score" if isinstance(press, ScorerPress) else "compress"
        if not any(name in _own_names(press) for name in (missing, "compress", "forward_hook", "__call__")):
            return {"press": name_of(press), "missing": missing}
    return None


def _own_names(press: BasePress) -> set[str]:
    """What a press and its classes define, other than base classes and our mixins."""
    classes = (one for one in type(press).__mro__ if one is not object and not is_base(one))
    own = (one for one in classes if issubclass(one, BasePress) or not issubclass(one, PressMixin))
    return {*vars(press), *(name for one in own for name in vars(one))}


def _wraps_a_quantizer(stack: _Stack) -> Found:
    wrapping = (press for press in stack.evictors if any(_with("quantizes", with_inner(press))))
    return _one(wrapping)


def _shortened_before(stack: _Stack) -> Found:
    shortened_by = None
    for press in stack.evictors:
        traits = traits_of(press)
        pairing = next(_with("whole_context", with_inner(press)), None)
        if shortened_by is not None and pairing is not None and not traits.only_decodes:
            return {"press": name_of(pairing), "other": name_of(shortened_by)}
        if not traits.keeps_tokens:
            shortened_by = press
    return None


def _with(trait: str, presses: Iterable[BasePress]) -> Iterator[BasePress]:
    return (press for press in presses if getattr(traits_of(press), trait))


def _one(presses: Iterable[BasePress]) -> Found:
    press = next(iter(presses), None)
    return None if press is None else {"press": name_of(press)}


def _pair(first: Iterable[BasePress], second: Iterable[BasePress]) -> Found:
    press, other = next(iter(first), None), next(iter(second), None)
    return None if press is None or other is None else {"press": name_of(press), "other": name_of(other)}


def _followed(trait: str, presses: Sequence[BasePress]) -> Found:
    """A press with a trait that has another behind it, and that one."""
    pairs = ((one, behind) for one, behind in pairwise(presses) if any(_with(trait, [one])))
    press, other = next(pairs, (None, None))
    return None if press is None or other is None else {"press": name_of(press), "other": name_of(other)}


RULES: tuple[Rule, ...] = (
    Rule(
        "Compose got an empty list; give at least one press, or press=None for none",
        lambda stack: not stack.presses,
    ),
    Rule("{press} is given twice; make a second instance, or leave one out", _twice),
    Rule(
        "{press} has no {missing} of its own and cannot evict anything; give a press that has, such as "
        "SnapKV",
        _incomplete,
    ),
    Rule("{press} wraps a quantizer; write Compose([..., TurboQuant()])", _wraps_a_quantizer),
    Rule(
        "{press} evicts nothing by itself; put TurboQuant() behind it",
        lambda stack: None if stack.quantizers else _one(_with("demotes", stack.evictors)),
    ),
    Rule(
        "there is more than one quantizer ({names}); a cache can be packed once, keep one",
        lambda stack: len(stack.quantizers) > 1 and {"names": ", ".join(map(name_of, stack.quantizers))},
    ),
    Rule(
        "{press} comes before {other}: evict first, quantize last. Move the quantizer to the end",
        lambda stack: _followed("quantizes", stack.presses),
    ),
    Rule(
        "{press} acts after the prefill, where sinks are detected; use detect_sinks=0",
        lambda stack: _one(_with("at_exit", stack.evictors)) if stack.detects_sinks else None,
    ),
    Rule(
        "{press} merges values while decoding, which a packed cache would quantize a second time; use it "
        "without {other}, or DecodingPress, which only evicts",
        lambda stack: _pair(_with("merges_while_decoding", stack.inner), stack.quantizers),
    ),
    Rule(
        "{press} evicts other tokens from each head, and {other} has a plan of widths by head, whose pages "
        "need as many tokens in every head; use a plan by layer (`quantpress fit --by layer`), or a press "
        "that evicts as many in each head, such as SnapKV",
        lambda stack: _pair(_with("masks_heads", stack.inner), _with("widths_by_head", stack.quantizers)),
    ),
    Rule(
        "{press} moves tokens of the cache, and {other} goes by their slots while decoding; use one of "
        "the two",
        lambda stack: _pair(_with("demotes", stack.inner), _with("decodes", stack.inner)),
    ),
    Rule(
        "{press} names slots of the cache, and {other} would move them while decoding; use one of the two",
        lambda stack: (
            _pair(_with("masks_heads", stack.at_prefill), _with("moves_slots", stack.inner))
            if stack.quantizers
            else None
        ),
    ),
    Rule(
        "{press} counts slots on while decoding, and detected sinks move them; use detect_sinks=0",
        lambda stack: (
            _one(_with("keeps_scores", _with("decodes", stack.inner))) if stack.detects_sinks else None
        ),
    ),
    Rule(
        "{press} scores each key with the hidden state of its token, and {other} before it evicts some; put "
        "{press} first",
        _shortened_before,
    ),
    Rule(
        "{press} acts on the complete cache of its context; use it as the only evictor",
        lambda stack: _one(_with("at_exit", stack.evictors)) if len(stack.evictors) > 1 else None,
    ),
    Rule(
        "{press} names slots of the cache, and {other} behind it would move or hide them; put {press} "
        "last before the quantizer",
        lambda stack: _followed("demotes", stack.evictors),
    ),
    Rule(
        "{press} names slots of the cache, and {other} behind it would move them; put {press} last among "
        "the evictors, and only one such press",
        lambda stack: _followed("masks_heads", stack.evictors),
    ),
)
"""`Compose` raises the first reason. The subject is a `_Stack`."""
