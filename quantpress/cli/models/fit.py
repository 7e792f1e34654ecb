"""`quantpress fit`: which layers, or heads, need more bits, and a plan that meets a budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group
from rich.text import Text

from quantpress.cli.arguments import (
    Device,
    Dtype,
    check_loading,
    texts_and_output,
)
from quantpress.cli.output import Outcome
from quantpress.errors import InvalidInputError

if TYPE_CHECKING:
    from quantpress.cache.saved.width_plan import Width, WidthPlan
    from quantpress.evaluation.fitting.measured import Measured

PRESS = "TurboQuant.preset('small')"
WIDTHS = ("1", "2", "3", "4", "8")
ROW = 30  # layers in a line


@dataclass(frozen=True)
class Fitted(Outcome):
    """A plan.

    Args:
        file: path of the file.
        plan: what it holds.
    """

    file: str
    plan: "WidthPlan"

    @property
    def press(self) -> str:
        """The press with the plan, as it is written."""
        from quantpress.presses.expression import parse_press
        from quantpress.presses.traits import short_repr

        made: Any = parse_press(self.plan.press or PRESS)
        return short_repr(replace(made, bits=None, plan=self.plan))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plan = self.plan
        about = {
            name: getattr(plan, name) for name in ("model", "text", "press", "method", "context", "bits")
        }
        widths = {str(index): list(pair) for index, pair in plan.widths.items()}
        return {"file": self.file, "use": self.press, **about, "mean_bits": plan.mean_bits, "widths": widths}

    def __rich__(self) -> Group:
        from quantpress.cache.saved.width_plan import heads_of

        plan, lines = self.plan, list[str]()
        indices = sorted(plan.widths)
        for start in range(0, len(indices), ROW):
            row = indices[start : start + ROW]
            for name, cells in (("layer", row), *_sides([plan.widths[index] for index in row])):
                lines.append(f"{name:10}" + "".join(f"{cell:>3}" for cell in cells))
        size = f", {plan.bits:.2f} bits a value at {plan.context:,} tokens" if plan.context else ""
        how = f", method {plan.method}" if plan.method else ""
        lines.append(f"{self.file}: {plan.model}, mean width {plan.mean_bits:.2f}{size}{how}.")
        every = {bits for pair in plan.widths.values() for side in pair for bits in heads_of(side)}
        if 1 in every and "trellis" in self.press:
            lines.append("On a GPU, a slower kernel reads layers with trellis codes of 1 bit.")
        elif 1 in every:
            lines.append("On a GPU, a slower kernel reads 1 bit unless head_dim is 64, 128 or 256.")
        return Group(*map(Text, lines), Text(f'Use it: --press "{self.press}"', "bold"))


def _sides(pairs: Sequence[tuple["Width", "Width"]]) -> Iterator[tuple[str, list[Any]]]:
    """Names and widths of the rows of some layers: one for each side, or for each head of it."""
    from quantpress.cache.saved.width_plan import SIDES, heads_of

    most = max(len(heads_of(bits)) for pair in pairs for bits in pair)
    for side, name in enumerate(SIDES):
        every = [heads_of(pair[side]) * (most if len(heads_of(pair[side])) == 1 else 1) for pair in pairs]
        for head in range(most):
            own = [heads[head] if head < len(heads) else "" for heads in every]
            yield (name if most == 1 else f"{name} {head}"), own


def fit(
    model: Annotated[
        str | None, typer.Argument(help="Id or folder of a model; left out, the default model.")
    ] = None,
    bits: Annotated[
        float,
        typer.Option("--bits", "-b", help="Most bits a value, scales and windows in 16 bits included."),
    ] = 2.5,
    output: Annotated[str, typer.Option("--output", "-o", help="File to write.")] = "plan.json",
    context: Annotated[
        int, typer.Option("--context", "-c", help="Tokens of the context whose bytes are counted.", min=1)
    ] = 32768,
    widths: Annotated[
        str, typer.Option(help="Widths to choose from: of 1, 2, 3, 4 and 8, with commas.")
    ] = "2,3,4",
    press: Annotated[
        str, typer.Option("--press", "-p", help="The press whose windows and rotation are used.")
    ] = PRESS,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Text to read, - for the standard input; may be repeated."),
    ] = None,
    method: Annotated[
        Literal["layer-by-layer", "one-pass"],
        typer.Option(
            help="Measure each layer and width, or estimate all from gradients of one pass, which is faster."
        ),
    ] = "layer-by-layer",
    by: Annotated[
        Literal["layer", "head"],
        typer.Option(
            help="What has widths of its own: each layer, or each KV head, which saves more. A layer then "
            "has two groups of heads at most."
        ),
    ] = "layer",
    pieces: Annotated[
        int | None,
        typer.Option(
            help="Pieces of text to read; left out, 2 layer by layer and 4 in one pass.",
            min=1,
            show_default=False,
        ),
    ] = None,
    piece_tokens: Annotated[
        int,
        typer.Option(help="Tokens that are packed of each; 128 more are predicted.", min=256),
    ] = 1024,
    measured: Annotated[
        str | None,
        typer.Option("--from", help="A plan of the same model; its measurements are used again."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> Fitted:
    """Give each layer, or each head, the widths that cost least, within a budget in bytes."""
    texts = texts_and_output(text, output)
    choice = _widths(widths)
    if measured is not None:
        found = _measured(model, measured)
    else:
        check_loading(model, device, dtype)
        partial = Path(f"{output}.partial")
        options = {"method": method, "widths": choice, "by": by, "partial": partial}
        found = _measure(model, (device, dtype), texts, press, (pieces, piece_tokens), options)
    plan = found.plan(bits, context, choice, by)
    plan.save(output)
    if measured is None:
        partial.unlink(missing_ok=True)
    return Fitted(output, replace(plan, path=output))


def _widths(text: str) -> tuple[int, ...]:
    found = {one.strip() for one in text.split(",")}
    if not found <= set(WIDTHS):
        raise InvalidInputError(f"--widths is {text!r}; give some of {','.join(WIDTHS)}, such as 2,3,4")
    return tuple(sorted(map(int, found)))


def _measure(
    model: str | None,
    loading: tuple[str | None, str | None],
    texts: dict[str, str],
    press: str,
    sizes: tuple[int | None, int],
    options: dict[str, Any],
) -> "Measured":
    """Measure a model; what an interrupted command has finished is not read again."""
    from quantpress.cli.loading import load_pipeline, model_name
    from quantpress.evaluation.divergence.documents import Pieces
    from quantpress.evaluation.fitting.fit import PIECES, measure
    from quantpress.evaluation.fitting.pieces import CONTINUATION
    from quantpress.presses.expression import parse_press

    made: Any = parse_press(press)
    pipe = load_pipeline(model, *loading)
    count, tokens = sizes
    pieces = Pieces(count or PIECES[options["method"]], tokens, CONTINUATION)
    name = Path(model_name(pipe)).name
    return measure(pipe.model, pipe.tokenizer, texts or None, made, pieces, name=name, **options)


def _measured(model: str | None, file: str) -> "Measured":
    """The measurements in the file of a plan."""
    from quantpress.cache.saved.width_plan import WidthPlan
    from quantpress.evaluation.fitting.measured import Measured
    from quantpress.evaluation.sizing.model_outline import outline
    from quantpress.presses.expression import parse_press

    plan, known = WidthPlan.load(file), outline(model)
    if not plan.errors:
        raise InvalidInputError(f"{file} has no errors; run `quantpress fit MODEL` without --from")
    for layer in known.layers[:1]:
        plan.check(layer.module.config)
    made: Any = parse_press(plan.press)
    return Measured(plan.model, plan.text, made, plan.errors, known, plan.fingerprint, plan.method)
