"""What a press is made of: a composition is treated like the presses inside it.

kvpress's pipeline asks `isinstance(press, KeyRerotationPress)` and the like, which a press inside a
composition does not answer. Here the question goes to every member.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from kvpress import BasePress, FinchPress, RestoreKVPress
from transformers import PreTrainedModel

from quantpress.errors import InvalidInputError
from quantpress.presses.composition import decodes, rerotates, with_inner
from quantpress.presses.expression import parse_press
from quantpress.presses.finch import Finch, name_delimiter

if TYPE_CHECKING:
    from quantpress.presses import Compose

PressOrBits: TypeAlias = BasePress | type[BasePress] | Sequence[Any] | str | float | None


def as_press(press: Any) -> BasePress | None:
    """What a user gives as press=: a press, its class, a list of both (`Compose`), or text (`parse_press`).

    Raises:
        CompositionError: presses that do not go together.
        InvalidInputError: something else.
    """
    if press is None or isinstance(press, BasePress):
        return press
    from quantpress.presses import Compose

    if isinstance(press, str):
        return parse_press(press)
    if isinstance(press, type) and issubclass(press, BasePress):
        return Compose([press])
    if isinstance(press, (list, tuple)):
        return Compose(list(press))
    raise InvalidInputError(
        f"press={press!r} is no press; give a kvpress press, a press class, a list of them, or text"
    )


def chosen_press(press: PressOrBits, options: dict[str, Any]) -> "Compose":
    """What a user gives `enable`, as a composition.

    Raises:
        CompositionError: presses that do not go together.
        InvalidInputError: something else, or options beside a press.
    """
    from quantpress.presses import Compose, TurboQuant
    from quantpress.presses.presets import PRESETS

    if press is None:
        return Compose([TurboQuant(**options)])
    if isinstance(press, str) and press in PRESETS:
        return Compose([TurboQuant.preset(press, **options)])
    if isinstance(press, (int, float)) and not isinstance(press, bool):
        return Compose([TurboQuant(bits=press, **options)])
    if options:
        raise InvalidInputError(
            f"{', '.join(options)} given beside {press!r}; set them on the press itself, TurboQuant(...)"
        )
    chosen = as_press(press)
    return chosen if isinstance(chosen, Compose) else Compose([chosen])


def hand_tokenizer(press: BasePress | None, model: PreTrainedModel, tokenizer: Any) -> None:
    """Tell the presses that need a delimiter in the text (Finch) which token it is, if nobody has yet.

    kvpress's own FinchPress has the model embed the delimiter, so that a model without room for one more
    token grows by it; `Finch` does not.
    """
    for finch in (inner for member in members(press) for inner in with_inner(member)):
        if isinstance(finch, FinchPress) and finch.delimiter_token_id is None:
            token = name_delimiter(finch, tokenizer)
            embedding: Any = model.get_input_embeddings()
            if not isinstance(finch, Finch) and token >= embedding.weight.shape[0]:
                model.resize_token_embeddings(token + 1)


def members(press: BasePress | None) -> Iterator[BasePress]:
    """The press itself, then everything inside it (`Compose`, kvpress's `ComposedPress`), in order."""
    if press is not None:
        yield press
        for inner in getattr(press, "presses", ()):
            yield from members(inner)


def contains(press: BasePress | None, kinds: type | tuple[type, ...]) -> bool:
    """Whether the press, or one inside its composition, is an instance of `kinds`.

    Example:
        >>> from kvpress import ComposedPress, KnormPress, SnapKVPress
        >>> contains(ComposedPress([SnapKVPress(), KnormPress()]), KnormPress), contains(None, KnormPress)
        (True, False)
    """
    return any(isinstance(member, kinds) for member in members(press))


def decode_time_presses(press: BasePress | None) -> list[BasePress]:
    """The members that also act while the answer is generated."""
    return [member for member in members(press) if decodes(member)]


def renumbers_positions(press: BasePress | None) -> bool:
    """Whether kept tokens get new positions without gaps: the next position is then the number kept."""
    return contains(press, RestoreKVPress) or any(rerotates(member) for member in members(press))
