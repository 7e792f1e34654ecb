"""The base classes of our presses. `names.py` declares kvpress's presses with them, one statement each.

    class SimLayerKV(EvictingPress, kvpress.SimLayerKVPress, ratio_name="lazy_threshold", ratio_follows=True):
        "What it does."

The result is a dataclass with the fields of kvpress's own class, which is the last base. It has a default
that evicts, and errors that say what is wrong. Keywords of the statement are the defaults below, and traits
(`quantpress.presses.traits`). The first declaration of a class of kvpress describes that class, too.
"""

import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import nn

from quantpress.errors import InvalidInputError
from quantpress.presses.arguments import (
    check_arguments,
    check_kinds,
    inner_press,
    is_press,
)
from quantpress.presses.base_press import BasePress, ScorerPress, check_ratio
from quantpress.presses.guard import like_llama, named_failure
from quantpress.presses.models.filling import filled_caches
from quantpress.presses.models.full_layers import as_kvpress_sees
from quantpress.presses.models.lock import model_lock
from quantpress.presses.ranks import own_heads
from quantpress.presses.traits import TRAITS, Trait, describe

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

Press = TypeVar("Press", bound="PressMixin")

DEFAULT_RATIO = 0.5
"""Fraction of the tokens that a press evicts unless told otherwise."""


class PressMixin:
    """The first base of each of our presses, before a class of kvpress.

    Keywords of the class statement are the press's traits: `class Mine(PressMixin, BasePress, at_exit=True)`.
    `SnapKV(0.5) | TurboQuant(4)` is `Compose([SnapKV(0.5), TurboQuant(4)])`; the other side may be any press
    or press class.
    """

    composition: ClassVar[Any]
    """The class that `|` makes an instance of. `compose.py` sets it to `Compose`."""

    remedies: ClassVar[Mapping[str, str]] = {}
    """What to do instead of giving an argument that the press does not have, by its name."""

    def __init_subclass__(cls, **traits: Trait) -> None:
        super().__init_subclass__()
        if traits:
            describe(cls, **traits)

    def __new__(cls: type[Press], *values: Any, **named: Any) -> Press:
        """A new press.

        Raises:
            InvalidInputError: the press does not have such an argument.
        """
        if named or len(values) > 1:
            check_arguments(cls, values, named)
        return super().__new__(cls)

    @contextmanager
    def __call__(self, model: "PreTrainedModel") -> Generator[None, None, None]:
        """Apply the press to every prefill inside the context; other threads wait for the model meanwhile.

        Raises:
            UnsupportedModelError, InvalidInputError: see `filled_caches` and `like_llama`.
        """
        upstream: Any = super()
        press: Any = self
        with ExitStack() as stack:
            stack.enter_context(model_lock(model))
            stack.enter_context(filled_caches(model))
            stack.enter_context(own_heads(press, model))
            stack.enter_context(like_llama(press, model))
            stack.enter_context(upstream.__call__(as_kvpress_sees(model, self)))
            yield

    def __or__(self, other: Any) -> Any:
        return self.composition([self, other]) if is_press(other) else NotImplemented

    def __ror__(self, other: Any) -> Any:
        return self.composition([other, self]) if is_press(other) else NotImplemented


def _wrapped(cls: type) -> type | None:
    """The class of kvpress that a class gives a name; None for the bases here, and for subclasses of ours."""
    last = cls.__bases__[-1]
    return last if issubclass(last, BasePress) and not issubclass(last, PressMixin) else None


def _set_default(cls: type, name: str, annotation: Any, default: Any) -> None:
    """Declare a field, unless the class body declares it."""
    own = inspect.get_annotations(cls)
    if name not in own:
        cls.__annotations__ = {name: annotation, **own}
        setattr(cls, name, default)


class NamedPress(PressMixin):
    """A press of kvpress. An error at a prefill names the press, the number of tokens and the remedy."""

    remedies: ClassVar[Mapping[str, str]] = {
        "bits": "it only evicts; to quantize what is left put TurboQuant(bits=...) behind it",
    }

    def __init_subclass__(cls, **traits: Trait) -> None:
        upstream = _wrapped(cls)
        if upstream is None:
            super().__init_subclass__(**traits)
        else:
            super().__init_subclass__()
            dataclass(cls)
            describe(cls if upstream in TRAITS else upstream, **traits)

    def __post_init__(self) -> None:
        check_kinds(self)
        upstream = getattr(super(), "__post_init__", None)
        if upstream is not None:
            try:
                upstream()
            except AssertionError as error:
                reason = str(error) or "an argument is out of its range"
                raise InvalidInputError(f"{type(self).__name__}: {reason}") from error

    def forward_hook(
        self, module: nn.Module, input: list[torch.Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """kvpress's hook.

        Raises:
            InvalidInputError: the press cannot compress this context.
        """
        press: Any = self
        with named_failure(press, kwargs["hidden_states"].shape[1]):
            result: list[Any] = super().forward_hook(module, input, kwargs, output)  # type: ignore[misc]
            return result


class EvictingPress(NamedPress):
    """A press with a ratio, which raises an exception where kvpress has an assert.

    Keywords of the class statement: `ratio_name`, the field to check, and `ratio`, its default.
    """

    ratio_name: ClassVar[str] = "compression_ratio"

    def __init_subclass__(
        cls, ratio_name: str | None = None, ratio: float = DEFAULT_RATIO, **traits: Trait
    ) -> None:
        if ratio_name is not None:
            cls.ratio_name = ratio_name
        if _wrapped(cls) is not None:
            _set_default(cls, cls.ratio_name, float, ratio)
        super().__init_subclass__(**traits)

    def __post_init__(self) -> None:
        check_ratio(self, self.ratio_name, getattr(self, self.ratio_name))
        super().__post_init__()


class WrappingPress(NamedPress):
    """A press that works through another, which scores tokens; it is given as an instance or as a class.

    Keyword of the class statement: `inner`, which makes the default one.
    """

    press: ScorerPress
    inner_kind: ClassVar[type] = ScorerPress
    """What the press inside has to be."""
    remedies: ClassVar[Mapping[str, str]] = {
        **NamedPress.remedies,
        "compression_ratio": "give it to the press inside, {press}(SnapKV(compression_ratio=0.5))",
    }

    def __init_subclass__(cls, inner: Callable[[], ScorerPress] | None = None, **traits: Any) -> None:
        if inner is not None:
            _set_default(cls, "press", ScorerPress, field(default_factory=inner))
        super().__init_subclass__(**traits)

    def __post_init__(self) -> None:
        self.press = inner_press(self, self.press, self.inner_kind)
        super().__post_init__()


class RereadingPress(EvictingPress):
    """A press that loads a tokenizer by the name of its model."""

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Enter kvpress's own context.

        Raises:
            InvalidInputError: there is no tokenizer of that name.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(super().__call__(model))
            except OSError as error:
                raise InvalidInputError(
                    f"{type(self).__name__} loads the tokenizer that has its model's name, and there is none "
                    f"of the name {model.config.name_or_path!r}: save the model and its tokenizer in one "
                    "folder and load them from there, or set model.config._name_or_path to it"
                ) from error
            yield
