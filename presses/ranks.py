"""Presses on a model that several processes share: which can be applied, and what they see there.

A process has some of the heads. Most presses treat each head by itself, and only need to know how many there
are. Some compare the scores of heads: these are gathered. Some need more than scores: they are refused.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from quantpress.cache.ranks import Ranks, ranks_of, splits_queries
from quantpress.cache.saved.head_parts import own_slots
from quantpress.cache.tokens.evicted_slots import MASKS
from quantpress.errors import UnsupportedModelError
from quantpress.presses.base_press import BasePress
from quantpress.presses.models.attention import attention_modules
from quantpress.presses.traits import name_of, traits_of, with_inner
from quantpress.rule import Found, Rule, reasons

_MISSING = object()


def _needs_all_heads(press: BasePress) -> Found:
    needing = next((one for one in with_inner(press) if traits_of(one).needs_all_heads), None)
    return None if needing is None else {"press": name_of(needing)}


def _normalized(press: BasePress) -> Found:
    comparing = next((one for one in with_inner(press) if traits_of(one).compares_heads), None)
    if comparing is None or not traits_of(comparing.press).normalizes:
        return None
    return {"press": name_of(comparing), "inner": name_of(comparing.press)}


def _widths_by_head(press: BasePress) -> Found:
    packing = next((one for one in with_inner(press) if traits_of(one).widths_by_head), None)
    return None if packing is None else {"press": name_of(packing)}


RULES: tuple[Rule, ...] = (
    Rule(
        "{press} has a plan of widths by head, and each process of a model split by tensor parallelism has "
        "some of the heads; use a plan by layer (`quantpress fit --by layer`), or one process",
        _widths_by_head,
    ),
    Rule(
        "{press} decides with numbers of all heads, and each process of a model split by tensor parallelism "
        "has those of its own heads; use a press that treats each head by itself (SnapKV, ExpectedAttention, "
        "KeyDiff) or gathers scores (AdaKV, ChunkKV), or one process",
        _needs_all_heads,
    ),
    Rule(
        "{press} compares heads by scores of {inner}, which are relative to all heads of the layer, and each "
        "process of a model split by tensor parallelism has those of its own heads; give {press} another "
        "press, such as SnapKV, or use one process",
        _normalized,
    ),
)
"""What a press must keep on a model whose heads are split over processes. The subject is the press."""


def why_not(press: BasePress) -> list[str]:
    """Every reason why a press cannot be applied where each process has some of the heads.

    Args:
        press: a press, or a composition.

    Example:
        >>> from quantpress.presses import SnapKV, TOVA
        >>> why_not(SnapKV(0.5)), why_not(TOVA(0.5))[0].split(",")[0]
        ([], 'TOVA decides with numbers of all heads')
    """
    return reasons(RULES, press)


@contextmanager
def own_heads(press: BasePress, model: nn.Module) -> Iterator[None]:
    """While inside, a press sees the heads of this process, and scores of all heads where it compares them.

    Nothing happens unless the model's KV heads are split over several processes. May be nested.

    Raises:
        UnsupportedModelError: the press cannot work there.
    """
    ranks = ranks_of(model)
    if ranks is None or not ranks.split_heads:
        yield
        return
    if found := why_not(press):
        raise UnsupportedModelError(found[0])
    with ExitStack() as stack:
        for module in attention_modules(model):
            stack.enter_context(_own_numbers(module, ranks.count))
        for one in with_inner(press):
            if traits_of(one).compares_heads:
                stack.enter_context(_all_scores(one, ranks))
        yield


@contextmanager
def _own_numbers(module: Any, ranks: int) -> Iterator[None]:
    """Give a module a configuration of its own, with the numbers of heads that it has."""
    whole = module.config
    if getattr(whole, "_of_one_rank", False):
        yield
        return
    own = copy.copy(whole)
    vars(own)["_of_one_rank"] = True
    for name, split in (("num_key_value_heads", True), ("num_attention_heads", splits_queries(module))):
        if split and getattr(whole, name, None) is not None:
            setattr(own, name, getattr(whole, name) // ranks)
    with _replaced(module, "config", own):
        yield


@contextmanager
def _all_scores(press: Any, ranks: Ranks) -> Iterator[None]:
    """Let the press inside give scores of all heads, and keep of what is named the slots of own heads."""
    inner = press.press
    score, compress, compress_inner = inner.score, press.compress, inner.compress
    if getattr(score, "of_all_heads", False):
        yield
        return

    def score_all(*args: Any, **kwargs: Any) -> Tensor:
        return ranks.gathered(score(*args, **kwargs), dim=1)

    def compress_alone(*args: Any, **kwargs: Any) -> Any:  # where a context is too short for the outer press
        with _replaced(inner, "score", score):
            return compress_inner(*args, **kwargs)

    def compress_own(module: nn.Module, hidden_states: Tensor, keys: Tensor, *rest: Any) -> Any:
        kept = compress(module, hidden_states, keys, *rest)
        _name_own(module, keys.shape[1], ranks.index)
        return kept

    score_all.of_all_heads = True  # type: ignore[attr-defined]
    with (
        _replaced(inner, "score", score_all),
        _replaced(inner, "compress", compress_alone),
        _replaced(press, "compress", compress_own),
    ):
        yield


@contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute of an object, for a while."""
    attributes = vars(owner)
    before = attributes.get(name, _MISSING)
    attributes[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            del attributes[name]
        else:
            attributes[name] = before


def _name_own(module: Any, heads: int, rank: int) -> None:
    """Of the slots that a press named in all heads, (batch, head, slot), keep those of this rank's heads."""
    named = getattr(module, MASKS, None)
    if named is None:
        return
    own = own_slots(named, heads, rank)
    setattr(module, MASKS, own if len(own[0]) else None)
