"""`Compose`: several presses as one. Evictors first, the quantizer last."""

import inspect
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantpress.errors import CompositionError, InvalidInputError, QuantPressError
from quantpress.presses.arguments import one_by_one
from quantpress.presses.base import DEFAULT_RATIO, PressMixin
from quantpress.presses.base_press import BasePress, check_ratio, is_of_kvpress
from quantpress.presses.guard import guarded, like_llama
from quantpress.presses.models.attention import hooked
from quantpress.presses.models.eligibility import EVICTABLE, check
from quantpress.presses.models.filling import filled_caches
from quantpress.presses.models.restore import left_as_found
from quantpress.presses.packing.pack_layers import Packer
from quantpress.presses.packing.prefill_hook import forget_attention_weights
from quantpress.presses.presets import COMPOSITIONS
from quantpress.presses.ranks import own_heads
from quantpress.presses.rules import why_not
from quantpress.presses.traits import import_kvpress, name_of, short_repr, traits_of, with_inner
from quantpress.presses.turboquant import TurboQuant

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel


@dataclass(repr=False)
class Compose(PressMixin, BasePress):
    """Applies presses one after the other, each in its own context.

    kvpress's `ComposedPress` only chains hooks. Here each press's own context is entered, so presses that
    replace `forward` or act when their context ends work, too. Sliding-window layers are left alone in every
    model.

    Args:
        presses: instances or classes; a class means its defaults. A `Compose` among them is flattened, and so
            are classes joined by `|`.

    Attributes:
        presses: the instances, evictors first, then the quantizer if there is one.

    Raises:
        CompositionError: the presses do not work together, or not in this order.

    Example:
        >>> from quantpress.presses import SnapKV, TurboQuant
        >>> Compose([SnapKV, TurboQuant(bits=3)])
        Compose(SnapKV(0.5) | TurboQuant(3))
    """

    presses: Sequence[Any]

    def __post_init__(self) -> None:
        self.presses = _one_by_one(self.presses)
        reasons = why_not(self.presses)
        if reasons:
            raise CompositionError(reasons[0])

    @classmethod
    def preset(cls, name: str, compression_ratio: float = DEFAULT_RATIO, **settings: Any) -> "Compose":
        """A composition by name.

        "question_aware" keeps a fixed fraction of the tokens, those that the question attends to with their
        neighbours, and packs them: `ChunkKV(SnapKV(compression_ratio)) | TurboQuant(4)`. The press has to see
        the question: ask with `question_aware=True`, or let `enable` read the whole prompt. docs/choosing.md
        has what it was measured on. For several questions about one text, keep every token instead.

        Args:
            name: one of `COMPOSITIONS`.
            compression_ratio: fraction of the tokens evicted.
            **settings: fields of `TurboQuant`, such as bits=3.

        Raises:
            InvalidInputError: there is no such composition, or a value cannot be used.
            MissingPackageError: kvpress is not installed.

        Example:
            >>> Compose.preset("question_aware", 0.3, bits=3)
            Compose(ChunkKV(SnapKV(0.3)) | TurboQuant(3))
        """
        if not isinstance(name, str) or name not in COMPOSITIONS:
            raise InvalidInputError(f"there is no composition {name!r}; use one of {', '.join(COMPOSITIONS)}")
        names = import_kvpress(f"Compose.preset({name!r})")
        return cls([names.ChunkKV(names.SnapKV(compression_ratio)), TurboQuant(**settings)])

    @property
    def quantizer(self) -> TurboQuant | None:
        """The press that packs the cache, if there is one."""
        last: Any = self.presses[-1]
        return last if traits_of(last).quantizes else None

    @property
    def evictors(self) -> tuple[BasePress, ...]:
        """The presses before the quantizer."""
        return tuple(press for press in self.presses if not traits_of(press).quantizes)

    @property
    def compression_ratio(self) -> float:
        """Fraction of the tokens evicted by all evictors together at the prefill.

        Assigning r to it gives each of n evictors the same share, 1 - (1 - r)**(1/n). Presses that evict no
        token (TurboQuant, ThinK, Demote) or do so only while decoding do not count.

        Raises:
            InvalidInputError: an evictor's ratio is known only after a prefill, or the assigned value is not
                in 0 <= r < 1.
            AttributeError: a value is assigned, but there is no evictor, or an evictor's ratio follows from
                its other settings.
        """
        kept = 1.0
        for press in self._with_ratio():
            try:
                kept *= 1 - press.compression_ratio
            except (AssertionError, ValueError) as error:
                raise InvalidInputError(
                    f"the compression_ratio of {name_of(press)} is known only after a prefill"
                ) from error
        return 1 - kept

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        check_ratio(self, "compression_ratio", value)
        evictors = self._with_ratio()
        if not evictors:
            raise AttributeError(f"{self!r} has no evictor whose compression_ratio could be set")
        for press in evictors:
            if traits_of(press).ratio_follows:
                raise AttributeError(
                    f"the compression_ratio of {name_of(press)} follows from its other settings; set those"
                )
        for press in evictors:
            press.compression_ratio = 1 - (1 - value) ** (1 / len(evictors))

    def _with_ratio(self) -> list[BasePress]:
        traits = ((press, traits_of(press)) for press in self.evictors)
        return [press for press, one in traits if not (one.keeps_tokens or one.decodes)]

    def contains(self, press_class: type[BasePress] | tuple[type[BasePress], ...]) -> bool:
        """Whether a press of this class is among the presses, or inside one of them."""
        return any(isinstance(inner, press_class) for press in self.presses for inner in with_inner(press))

    def __iter__(self) -> Iterator[BasePress]:
        return iter(self.presses)

    def __len__(self) -> int:
        return len(self.presses)

    def __repr__(self) -> str:
        return f"Compose({' | '.join(map(short_repr, self.presses))})"

    def post_init_from_model(self, model: "PreTrainedModel") -> None:
        """Let each press look at the model, for a wrapper that does not enter our context."""
        for press in self.presses:
            press.post_init_from_model(model)

    def forward_hook(
        self, module: nn.Module, input: list[torch.Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """Chain the presses' hooks, for a wrapper that does not enter our context.

        Raises:
            CompositionError: a press acts only when its context ends, so a hook is not enough.
        """
        packer = self._packer()
        for press in self.evictors:
            if traits_of(press).at_exit:
                raise CompositionError(
                    f"{name_of(press)} acts at the end of its context; use {self!r} itself as the context"
                )
        if packer is not None:
            packer.record(module, input, kwargs, output)
        for press in self.evictors:
            output = press.forward_hook(module, input, kwargs, output)
            if press is not self.evictors[-1]:
                output = forget_attention_weights(module, input, kwargs, output)
            if packer is not None:
                packer.follow(module, input, kwargs, output)
        if packer is not None:
            packer.pack(module, input, kwargs, output)
        return output

    @contextmanager
    def __call__(self, model: "PreTrainedModel") -> Generator[None, None, None]:
        """Apply the presses to every prefill inside the context.

        Raises:
            UnsupportedModelError: a press cannot work with this model.
        """
        failure: BaseException | None = None
        try:
            with left_as_found(model), ExitStack() as stack:
                self._enter(stack, model)
                try:
                    yield
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            if failure is not None and error is not failure:
                raise failure from error  # not what a press raised on its way out
            raise

    def _enter(self, stack: ExitStack, model: "PreTrainedModel") -> None:
        """Enter the contexts: the record of the original keys, then the evictors, then the quantizer."""
        packer = self._packer()
        if self.quantizer is not None:
            self.quantizer.prepare(model)
        if self.evictors:
            check(model, EVICTABLE)
        stack.enter_context(filled_caches(model, evicts=bool(self.evictors)))
        stack.enter_context(own_heads(self, model))
        if packer is not None:
            stack.enter_context(packer.recording(model))
        for press in self.evictors:  # before the first one evicts
            stack.enter_context(like_llama(press, model))
        for press in self.evictors:
            stack.enter_context(guarded(press, model))
            if press is not self.evictors[-1]:
                stack.enter_context(hooked(model, forget_attention_weights))
            if packer is not None:
                stack.enter_context(packer.following(model))
        if packer is not None:
            stack.enter_context(packer.packing(model))

    def _packer(self) -> Packer | None:
        if self.quantizer is None:
            return None
        inner = [traits_of(press) for evictor in self.evictors for press in with_inner(evictor)]
        demote: Any = next((press for press in self.evictors if traits_of(press).demotes), None)
        return Packer(
            self.quantizer,
            sink_tokens=max([self.quantizer.sink_tokens, *(traits.sink_tokens for traits in inner)]),
            rerotated=any(traits.rerotates for traits in inner),
            at_exit=any(traits.at_exit for traits in inner),
            by_head=not any(traits.only_decodes for traits in inner),
            demote=demote,
        )


PressMixin.composition = Compose


def _one_by_one(presses: Any) -> tuple[BasePress, ...]:
    """Instances of the presses that `Compose` is given, with compositions among them flattened.

    Raises:
        CompositionError: an entry is not a press, or is a class that needs arguments.
    """
    if isinstance(presses, (str, BasePress, type)) or not isinstance(presses, Iterable):
        raise CompositionError(f"Compose takes a list of presses, got {presses!r}; write Compose([...])")
    each = (one for press in presses for one in one_by_one(press))
    return tuple(member for press in each for member in _flattened(_instance(press)))


def _flattened(press: BasePress) -> Iterator[BasePress]:
    made: Any = press
    if isinstance(press, Compose) or is_of_kvpress(type(press), "ComposedPress"):
        for member in made.presses:
            yield from _flattened(member)
    elif (
        is_of_kvpress(type(press), "PrefillDecodingPress")
        and made.prefilling_press
        and not made.decoding_press
    ):
        yield from _flattened(made.prefilling_press)  # nothing happens while decoding
    else:
        yield press


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
            stacklevel=6,
        )
    return made
