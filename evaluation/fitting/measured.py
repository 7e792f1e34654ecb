"""What was measured of a model, of which plans are made without reading it again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from quantpress.cache.saved.width_plan import Errors, WidthPlan, heads_of
from quantpress.errors import InvalidInputError
from quantpress.evaluation.fitting.byte_budget import ByteBudget
from quantpress.evaluation.sizing.model_outline import ModelOutline
from quantpress.presses.traits import short_repr
from quantpress.presses.turboquant import TurboQuant

DEFAULT_CONTEXT = 32768
"""Tokens of the context that the bytes are counted for."""

DEFAULT_WIDTHS = (2, 3, 4)
"""Widths to choose from: those that fused kernels read at every head_dim, and that vLLM has."""

By = Literal["layer", "head"]
LAYER, HEAD = get_args(By)


@dataclass(frozen=True)
class Measured:
    """What is known of a model before a budget is given.

    Args:
        model: name of the model.
        text: name of the text that it read.
        press: windows, rotation and all else but the widths.
        errors: as in `WidthPlan`.
        outline: the model.
        fingerprint: as in `WidthPlan`.
        method: how they were measured, as `fit.measure` names it.
    """

    model: str
    text: str
    press: TurboQuant
    errors: Errors
    outline: ModelOutline
    fingerprint: Mapping[str, Any]
    method: str = ""

    def budget(self, context: int) -> ByteBudget:
        """The bytes of the packed layers for a context."""
        layers = [layer for layer in self.outline.layers if layer.index in self.errors]
        return ByteBudget(layers, self.press, context, self.outline.dtype)

    def errors_by(self, by: By) -> Errors:
        """The errors of layers or of heads.

        Raises:
            InvalidInputError: those of heads were not measured.
        """
        check_by(by)
        if by == LAYER:
            return sums(self.errors)
        known = [error for pair in self.errors.values() for side in pair for error in side.values()]
        if not all(isinstance(error, tuple) for error in known):
            raise InvalidInputError(
                "the errors were measured by layer, but widths by head need those of each head; measure them "
                'with by="head" (`quantpress fit --by head` without --from)'
            )
        return self.errors

    def plan(
        self,
        bits: float,
        context: int = DEFAULT_CONTEXT,
        widths: Sequence[int] = DEFAULT_WIDTHS,
        by: By = LAYER,
    ) -> WidthPlan:
        """The plan of least divergence within a budget.

        Args:
            bits: most bits a value of the packed layers at this context, in true bytes: codes, scales,
                statistics, and windows in 16 bits.
            context: tokens of the context.
            widths: the widths to choose from.
            by: what has widths of its own, "layer" or "head". Errors of heads add up to those of layers.

        Raises:
            InvalidInputError: the budget cannot be met, or a width, or the heads, were not measured.
        """
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits < float("inf"):
            raise InvalidInputError(f"bits is {bits!r}; give the bits a value, such as 2.5")
        budget = self.budget(context)
        chosen = budget.widths(among(self.errors_by(by), widths), int(bits * budget.numbers / 8))
        return WidthPlan(
            model=self.model,
            fingerprint=self.fingerprint,
            widths=chosen,
            text=self.text,
            press=short_repr(self.press),
            method=self.method,
            context=context,
            bits=budget.bits(chosen),
            errors=self.errors,
        )


def check_by(by: str) -> None:
    """Refuse what is no unit of widths.

    Raises:
        InvalidInputError: it is neither "layer" nor "head".
    """
    if by not in get_args(By):
        raise InvalidInputError(f"by is {by!r}; give one of {', '.join(get_args(By))}")


def sums(errors: Errors) -> Errors:
    """The errors of layers, where those of heads are added up."""
    return {
        index: (
            {bits: sum(heads_of(error)) for bits, error in keys.items()},
            {bits: sum(heads_of(error)) for bits, error in values.items()},
        )
        for index, (keys, values) in errors.items()
    }


def among(errors: Errors, widths: Sequence[int]) -> Errors:
    """The errors of some widths.

    Raises:
        InvalidInputError: there is no width, or one was not measured.
    """
    known = {bits for sides in errors.values() for side in sides for bits in side}
    if not widths or not known.issuperset(widths):
        raise InvalidInputError(
            f"widths are {', '.join(map(str, widths)) or 'none'}; choose from those that were "
            f"measured, {', '.join(map(str, sorted(known)))}, or measure others"
        )
    return {
        index: ({bits: keys[bits] for bits in widths}, {bits: values[bits] for bits in widths})
        for index, (keys, values) in errors.items()
    }
