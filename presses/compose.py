"""`Compose`: several presses as one. Evictors first, the quantizer last."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import BasePress, DecodingPress, StreamingLLMPress, ThinKPress
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from quantpress.errors import CompositionError, InvalidInputError
from quantpress.presses.composition import (
    AT_EXIT,
    RATIO_FOLLOWS,
    checked_presses,
    decodes,
    name_of,
    rerotates,
    short_repr,
    with_inner,
)
from quantpress.presses.demote import Demote
from quantpress.presses.guard import guarded
from quantpress.presses.models.filling import filled_caches
from quantpress.presses.models.restore import left_as_found
from quantpress.presses.models.support import check_evictable
from quantpress.presses.names import check_ratio
from quantpress.presses.packing.pack_layers import Packer, hooked
from quantpress.presses.packing.prefill_hook import forget_attention_weights
from quantpress.presses.piping import Pipeable
from quantpress.presses.turboquant import TurboQuant


@dataclass(repr=False)
class Compose(Pipeable, BasePress):
    """Applies presses one after the other, each in its own context.

    kvpress's `ComposedPress` chains hooks only; entering each press's own context makes those work too that
    replace `forward` or act when their context ends. Sliding-window layers are left to the model, in every
    model.

    Args:
        presses: instances or classes; a class means its defaults. A `Compose` among them is flattened.

    Attributes:
        presses: the instances, evictors first, then the quantizer if there is one.

    Raises:
        CompositionError: the presses do not go together, or not in this order.

    Example:
        >>> from quantpress.presses import SnapKV, TurboQuant
        >>> Compose([SnapKV, TurboQuant(bits=3)])
        Compose(SnapKV(0.5) | TurboQuant(3))
    """

    presses: Sequence[BasePress | type[BasePress]]

    flattens = True

    def __post_init__(self) -> None:
        self.presses = checked_presses(self.presses)

    @property
    def quantizer(self) -> TurboQuant | None:
        """The press that packs the cache, if there is one."""
        last: Any = self.presses[-1]
        return last if isinstance(last, TurboQuant) else None

    @property
    def evictors(self) -> tuple[BasePress, ...]:
        """The presses before the quantizer."""
        return tuple(press for press in self.presses if not isinstance(press, TurboQuant))

    @property
    def compression_ratio(self) -> float:
        """Fraction of the tokens evicted by all evictors together at the prefill.

        Assigning r to it gives each of n evictors the same share, 1 - (1 - r)**(1/n). Presses that evict no
        token (TurboQuant, ThinK, Demote) or do so only while decoding do not count.

        Raises:
            InvalidInputError: an evictor's ratio is known only after a prefill, or the one assigned is wrong.
            AttributeError: assigned, and there is no evictor, or its ratio follows from something else.
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
            if isinstance(press, RATIO_FOLLOWS):
                raise AttributeError(
                    f"the compression_ratio of {name_of(press)} follows from its other settings; set those"
                )
        for press in evictors:
            press.compression_ratio = 1 - (1 - value) ** (1 / len(evictors))

    def _with_ratio(self) -> list[BasePress]:
        keeping = (Demote, ThinKPress)
        return [press for press in self.evictors if not (isinstance(press, keeping) or decodes(press))]

    def contains(self, press_class: type[BasePress] | tuple[type[BasePress], ...]) -> bool:
        """Whether a press of this class is among the presses, or inside one of them."""
        return any(isinstance(inner, press_class) for press in self.presses for inner in with_inner(press))

    def __iter__(self) -> Iterator[BasePress]:
        return iter(self.presses)

    def __len__(self) -> int:
        return len(self.presses)

    def __repr__(self) -> str:
        return f"Compose({' | '.join(map(short_repr, self.presses))})"

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Let each press look at the model; for a wrapper that does not enter our context."""
        for press in self.presses:
            press.post_init_from_model(model)

    def forward_hook(
        self, module: nn.Module, input: list[torch.Tensor], kwargs: dict[str, Any], output: list[Any]
    ) -> list[Any]:
        """Chain the presses' hooks, for a wrapper that does not enter our context.

        Raises:
            CompositionError: a press acts at the end of its context.
        """
        packer = self._packer()
        for press in self.evictors:
            if isinstance(press, AT_EXIT):
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
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
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
                raise failure from error  # a press failed on its way out: what went wrong first counts
            raise

    def _enter(self, stack: ExitStack, model: PreTrainedModel) -> None:
        """Contexts from the outside in: keep the original keys, the evictors, the quantizer."""
        packer = self._packer()
        if self.quantizer is not None:
            self.quantizer.post_init_from_model(model)
        if self.evictors:
            check_evictable(model)
        stack.enter_context(filled_caches(model, evicts=bool(self.evictors)))
        if packer is not None:
            stack.enter_context(packer.recording(model))
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
        inner = [press for evictor in self.evictors for press in with_inner(evictor)]
        sinks = [press.n_sink for press in inner if isinstance(press, StreamingLLMPress)]
        return Packer(
            self.quantizer,
            sink_tokens=max([self.quantizer.sink_tokens, *sinks]),
            rerotated=any(map(rerotates, inner)),
            at_exit=any(isinstance(press, AT_EXIT) for press in inner),
            demote=next((press for press in self.evictors if isinstance(press, Demote)), None),
            by_head=not any(isinstance(press, DecodingPress) for press in inner),
        )
