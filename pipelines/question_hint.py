"""A hint, once for each kind of press: it evicts by a question that it has not seen."""

import logging
from dataclasses import dataclass

from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import members, name_of, short_repr, traits_of, with_inner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """How many of `CASES` planted numbers a press kept; `docs/results/question_in_view.json` has them.

    Args:
        press: in front of TurboQuant(4).
        blind: with the question behind the context.
        in_view: with the question in view of the press.
    """

    press: str
    blind: int
    in_view: int


CASES = 10
SNAPKV = Kept("SnapKV(0.5)", 0, 1)
CHUNKKV = Kept("ChunkKV(SnapKV(0.5))", 4, 9)
DEMOTE = Kept("Demote(SnapKV(0.5), bits=2)", 10, 10)

_hinted: set[str] = set()


def hint_at_unseen_question(press: BasePress | None) -> None:
    """Log a warning if a press in front of a quantizer evicts by the last queries, once for each kind.

    Args:
        press: the one that a context was read under, without the question that is now asked.
    """
    each = list(members(press))
    if any(traits_of(one).quantizes for one in each):
        for member in each:
            if evicts_by_last_queries(member) and name_of(member) not in _hinted:
                _hinted.add(name_of(member))
                logger.warning(_words(member))


def evicts_by_last_queries(press: BasePress) -> bool:
    """Whether a press, no composition, evicts at the prefill by what the last tokens attend to.

    Example:
        >>> from quantpress.presses import ChunkKV, Demote, KeyDiff, SnapKV
        >>> presses = SnapKV(), ChunkKV(SnapKV()), Demote(SnapKV()), KeyDiff()
        >>> [evicts_by_last_queries(one) for one in presses]
        [True, True, False, False]
    """
    traits = traits_of(press)
    if getattr(press, "presses", ()) or traits.keeps_tokens:
        return False
    if traits.whole_context:  # Chunk and Block go by the last tokens of each piece
        return False
    return any(traits_of(one).by_last_queries for one in with_inner(press, at_prefill=True))


def _words(press: BasePress) -> str:
    measured = CHUNKKV if name_of(press).removesuffix("Press") == "ChunkKV" else SNAPKV
    return (
        f"{short_repr(press)} keeps what the last tokens of the context attend to, and the question was not "
        f"among them. In a test {measured.press} in front of TurboQuant(4) then kept {measured.blind} of "
        f"{CASES} planted numbers. Give question_aware=True (--question-aware) with {CHUNKKV.press}, which "
        f"kept {CHUNKKV.in_view} of {CASES}; or, for many questions, {DEMOTE.press}, which evicts nothing "
        f"and kept {DEMOTE.blind} of {CASES}. docs/choosing.md has the table"
    )
