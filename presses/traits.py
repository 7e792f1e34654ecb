"""What a press is, as far as other presses and the pipelines need to know: a row of traits for each class.

`TRAITS` has the row of every press of kvpress and of ours. A row is written where the press gets its name,
mostly in `names.py`: as keywords of the class statement, or by `describe`. Subclasses inherit the traits of
their bases and state only what differs. A press of your own is described in the same way:

    describe(MyPress, masks_heads=True)
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from typing import Any, TypeAlias

from quantpress.cache import host
from quantpress.errors import InvalidInputError, MissingPackageError, extra
from quantpress.presses.base_press import BasePress, ScorerPress, is_of_kvpress

Trait: TypeAlias = bool | int | Callable[[Any], bool | int]
"""A trait's value, or a function of the press where the value depends on its settings."""


@dataclass(frozen=True)
class Traits:
    """What a press does under its present settings.

    Args:
        at_exit: acts when its context ends, on the complete cache of the context.
        decodes: acts while the answer is generated.
        only_decodes: does nothing at the prefill.
        moves_slots: removes tokens while decoding, so that slots of later tokens change.
        merges_while_decoding: changes values of kept tokens while decoding.
        keeps_tokens: removes no token at the prefill.
        masks_heads: names slots that single heads must not see (`masked_key_indices`), and leaves the cache
            as it is.
        whole_context: pairs each key with the hidden state, or the attention, of its token, so that no token
            may be missing.
        rerotates: gives the survivors consecutive positions, so that the next position is their count.
        adds_tokens: leaves tokens of its own in the cache, so that the next position is the cache's length.
        keeps_scores: keeps scores of one context on itself, by slot.
        ratio_follows: its compression_ratio follows from other settings, often from the text, and cannot be
            set.
        quantizes: packs the cache.
        widths_by_head: packs heads of a layer in widths of their own.
        demotes: chooses tokens that the quantizer behind it packs in fewer bits.
        needs_delimiter: looks for a token, `delimiter_token_id`, that stands between context and question.
        sink_tokens: how many of the first tokens it always keeps.
        compares_heads: compares the scores that the press inside gives to different heads.
        needs_all_heads: decides with other numbers of all heads of the model: their mean attention, budgets
            for all heads and layers, or weights trained for them.
        normalizes: its scores are relative to those of all heads of the layer.
        by_last_queries: keeps what the last tokens attend to, so that it depends on whether a question is
            among them.
        like_llama: computes queries or keys from hidden states, as Llama's attention does, so that it is
            wrong in a model whose attention does so in another way.
        takes_weights: leaves that alone where attention returns its weights ("eager"), and takes these.
    """

    at_exit: bool = False
    decodes: bool = False
    only_decodes: bool = False
    moves_slots: bool = False
    merges_while_decoding: bool = False
    keeps_tokens: bool = False
    masks_heads: bool = False
    whole_context: bool = False
    rerotates: bool = False
    adds_tokens: bool = False
    keeps_scores: bool = False
    ratio_follows: bool = False
    quantizes: bool = False
    widths_by_head: bool = False
    demotes: bool = False
    needs_delimiter: bool = False
    sink_tokens: int = 0
    compares_heads: bool = False
    needs_all_heads: bool = False
    normalizes: bool = False
    by_last_queries: bool = False
    like_llama: bool = False
    takes_weights: bool = False


TRAITS: dict[type, dict[str, Trait]] = {BasePress: {}, ScorerPress: {}}
"""The traits that each class states, by name; it inherits the others."""

DESCRIBES_KVPRESS = "quantpress.presses.names"
"""The module that describes kvpress's presses, imported when the first of them is met."""


def import_kvpress(what: str) -> Any:
    """Import kvpress, and describe its presses.

    Args:
        what: what needs it, as the subject of the error.

    Returns:
        The module that has its presses under our names.

    Raises:
        MissingPackageError: kvpress cannot be imported.
    """
    try:
        return import_module(DESCRIBES_KVPRESS)
    except ImportError as error:
        remedy = f"pip install {extra('kvpress')}"
        if not host.CALLS_TAKE_PLACES:
            remedy += ", which takes transformers 5.2; docs/versions.md has two commands for newer ones"
        reason = f"{what} needs kvpress, which cannot be imported ({error})"
        raise MissingPackageError(f"{reason}; {remedy}") from error


_NAMES = [field.name for field in fields(Traits)]
_INNER = ("press", "base_press", "prefilling_press", "decoding_press")


def describe(press_class: type, **traits: Trait) -> None:
    """Write a row of `TRAITS`.

    Args:
        press_class: the press.
        traits: those of `Traits` that differ from its bases', as values or as functions of the press.

    Raises:
        InvalidInputError: there is no trait of that name.
    """
    unknown = sorted(traits.keys() - set(_NAMES))
    if unknown:
        raise InvalidInputError(
            f"{press_class.__name__}: there is no trait {', '.join(unknown)}; "
            f"the traits are {', '.join(_NAMES)}"
        )
    TRAITS[press_class] = traits


def traits_of(press: BasePress) -> Traits:
    """The traits of a press.

    Example:
        >>> from kvpress import KnormPress, StreamingLLMPress
        >>> traits_of(StreamingLLMPress(0.5, n_sink=8)).sink_tokens, traits_of(KnormPress(0.5)).decodes
        (8, False)
    """
    if any(map(is_of_kvpress, type(press).__mro__)):
        import_module(DESCRIBES_KVPRESS)
    stated: dict[str, Any] = {}
    for base in reversed(type(press).__mro__):
        stated |= TRAITS.get(base, {})
    return Traits(**{name: value(press) if callable(value) else value for name, value in stated.items()})


def with_inner(press: BasePress, *, at_prefill: bool = False) -> Iterator[BasePress]:
    """The press and every press that it works through; `at_prefill`: without those that only decode."""
    if at_prefill and traits_of(press).only_decodes:
        return
    yield press
    inner = [getattr(press, name, None) for name in _INNER]
    for member in (*inner, *getattr(press, "presses", ())):
        if isinstance(member, BasePress):
            yield from with_inner(member, at_prefill=at_prefill)


def members(press: BasePress | None) -> Iterator[BasePress]:
    """The press, and the presses of a composition one by one; nothing for None."""
    if press is not None:
        yield press
        for inner in getattr(press, "presses", ()):
            yield from members(inner)


def decode_time_presses(press: BasePress | None) -> list[BasePress]:
    """The members that act while the answer is generated."""
    return [member for member in members(press) if traits_of(member).decodes]


def renumbers_positions(press: BasePress | None) -> bool:
    """Whether the next position after the context is the number of tokens in the cache."""
    traits = map(traits_of, members(press))
    return any(one.rerotates or one.adds_tokens for one in traits)


def name_of(press: BasePress) -> str:
    """Name of a press's class."""
    return type(press).__name__


def short_repr(press: Any) -> str:
    """A press as one would write it: its first argument, and those that differ from their defaults."""
    made = getattr(press, "__dataclass_params__", None)
    if made is None or not made.repr:  # such as `Compose`, which has a short repr itself
        return repr(press)
    parts = []
    shown_fields = (field for field in fields(press) if field.init and field.repr and field.name[0] != "_")
    for index, field in enumerate(shown_fields):
        value = getattr(press, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        shown = short_repr(value) if isinstance(value, BasePress) else repr(value)
        if index == 0 and value is not None:
            parts.append(shown)
        elif value != default:
            parts.append(f"{field.name}={shown}")
    return f"{type(press).__name__}({', '.join(parts)})"
