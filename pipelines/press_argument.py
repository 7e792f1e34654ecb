"""The press= argument of pipelines and of `enable`, made into a press; and the press of an enabled model."""

from collections.abc import Sequence
from importlib import import_module
from types import UnionType
from typing import Any, TypeAlias

from torch import nn
from transformers import PreTrainedModel

from quantpress.errors import InvalidInputError
from quantpress.presses.arguments import is_press
from quantpress.presses.base_press import BasePress
from quantpress.presses.compose import Compose
from quantpress.presses.expression import parse_press
from quantpress.presses.presets import COMPOSITIONS, PRESETS
from quantpress.presses.traits import members, short_repr, traits_of, with_inner
from quantpress.presses.turboquant import TurboQuant

ENABLED = "_quantpress_enabled"
"""The attribute of a model that holds its `Enabled`."""

AnyPress: TypeAlias = BasePress | type[BasePress] | UnionType | Sequence[Any] | str | None
PressOrBits: TypeAlias = AnyPress | float


def as_press(press: Any) -> BasePress | None:
    """What a user gives as press=: a press, its class, a list of both (`Compose`), or text (`parse_press`).

    Classes joined by `|` are a list of them.

    Raises:
        CompositionError: presses that do not go together.
        InvalidInputError: something else.
    """
    if isinstance(press, str):
        press = parse_press(press)
    if press is None or isinstance(press, BasePress):
        if press is not None and traits_of(press).demotes:
            Compose([press])  # refuses it without a quantizer: by itself it would do nothing
        return press
    if is_press(press):
        return Compose([press])
    if isinstance(press, (list, tuple)):
        return Compose(list(press))
    raise InvalidInputError(
        f"press={press!r} is no press; give a kvpress press, a press class, a list of them, or text"
    )


def chosen_press(press: PressOrBits, options: dict[str, Any]) -> Compose:
    """What a user gives `enable`, as a composition.

    Raises:
        CompositionError: presses that do not go together.
        InvalidInputError: something else, or options beside a press.
    """
    if press is None:
        return Compose([TurboQuant(**options)])
    if isinstance(press, str) and press in PRESETS:
        return Compose([TurboQuant.preset(press, **options)])
    if isinstance(press, str) and press in COMPOSITIONS:
        return Compose.preset(press, **options)
    if isinstance(press, (int, float)) and not isinstance(press, bool):
        return Compose([TurboQuant(bits=press, **options)])
    if options:
        raise InvalidInputError(
            f"{', '.join(options)} given beside {short_repr(press)}; set them on the press itself, "
            "TurboQuant(...)"
        )
    chosen = as_press(press)
    return chosen if isinstance(chosen, Compose) else Compose([chosen])


def hand_tokenizer(press: BasePress | None, model: PreTrainedModel, tokenizer: Any) -> None:
    """Tell the presses that need a delimiter in the text (Finch) which token it is, unless they know.

    The model embeds the delimiter of kvpress's own FinchPress, so a model without room for one more token
    grows by it. It never sees that of `Finch`.
    """
    for finch in (inner for member in members(press) for inner in with_inner(member)):
        if traits_of(finch).needs_delimiter and finch.delimiter_token_id is None:
            home = import_module("quantpress.presses.finch")
            token = home.name_delimiter(finch, tokenizer)
            embedding: Any = model.get_input_embeddings()
            if not isinstance(finch, home.Finch) and token >= embedding.weight.shape[0]:
                model.resize_token_embeddings(token + 1)


def enabled_press(model: nn.Module) -> BasePress | None:
    """The press of an enabled model; None for any other model."""
    press: BasePress | None = getattr(vars(model).get(ENABLED), "press", None)
    return press
