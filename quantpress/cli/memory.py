"""`quantpress memory`: what a cache will weigh, and what fits on a GPU."""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quantpress.cli.options import Presses
from quantpress.cli.output import Outcome
from quantpress.errors import InvalidInputError

if TYPE_CHECKING:
    from quantpress.evaluation.sizing.memory_plan import Capacity, MemoryPlan
    from quantpress.evaluation.sizing.model_outline import ModelOutline

UNITS = {"B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Sized(Outcome):
    """Plans for one model, the uncompressed cache first.

    Args:
        model: outline of the model.
        plans: one for each press.
        gpu_bytes: memory of the GPU that was asked about, or None.
        capacities: what fits on it, one for each plan; empty without a GPU.
    """

    model: "ModelOutline"
    plans: "tuple[MemoryPlan, ...]"
    gpu_bytes: int | None = None
    capacities: "tuple[Capacity, ...]" = ()

    @property
    def dtype(self) -> str:
        """The dtype of the weights, and of what is not packed of the cache."""
        return str(self.model.dtype).removeprefix("torch.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. Activations and what fits on a GPU are estimates."""
        plans = [plan.as_dict() for plan in self.plans]
        for plan, capacity in zip(plans, self.capacities, strict=False):
            plan["longest_context"], plan["largest_batch"] = capacity.context, capacity.batch
        model = {
            "name": self.model.name,
            "architecture": self.model.architecture,
            "attention_layers": len(self.model.layers),
            "other_layers": self.model.other_layers,
            "weights_bytes": self.model.weights_bytes,
            "quantized": self.model.quantized,
            "positions": self.model.positions,
            "dtype": self.dtype,
        }
        return {"model": model, "gpu_bytes": self.gpu_bytes, "presses": plans}

    def __rich__(self) -> RenderableType:
        from quantpress.pipelines.report import format_bytes

        first = self.plans[0]
        sequences = "" if first.batch == 1 else f", {first.batch} sequences"
        table = Table(title=f"{self.model.name}: {first.context:,} tokens{sequences}")
        table.add_column("cache", overflow="fold", min_width=24)
        names = ["codes", "tokens\nnot packed", "metadata", "in all", "ratio", "bits a\nvalue"]
        names += ["longest\ncontext", "largest\nbatch"] if self.capacities else []
        for name in names:
            table.add_column(name, justify="right")
        for index, plan in enumerate(self.plans):
            cache = plan.cache
            about = "" if plan.exact else "about "
            parts = (cache.packed_bytes, cache.dense_bytes, cache.metadata_bytes)
            row = [*map(format_bytes, parts), about + format_bytes(cache.total_bytes)]
            row += [f"{plan.ratio:.2f}x", f"{cache.bits_per_value:.2f}"]
            for capacity in self.capacities[index : index + 1]:
                row += [f"{capacity.context:,}", f"{capacity.batch:,}"]
            table.add_row(plan.press, *row)
        return Group(table, *(Text(line, "dim") for line in self._notes()))

    def _notes(self) -> list[str]:
        from quantpress.pipelines.report import format_bytes

        model, plan = self.model, self.plans[-1]
        sliding = sum(layer.sliding for layer in model.layers)
        notes = [f"The ratio is to all tokens uncompressed, in {self.dtype}."]
        if model.weights_bytes is not None:
            notes.append(f"Weights: {format_bytes(model.weights_bytes)} in {self.dtype}.")
            if model.quantized:
                notes.append("The checkpoint is quantized and weighs less: say how much with --weights.")
        if plan.activation_bytes is not None:
            notes.append(
                f"Work space while the context is read: about {format_bytes(plan.activation_bytes)} "
                "(an estimate)."
            )
        if self.gpu_bytes is not None:
            notes.append(
                f"In {format_bytes(self.gpu_bytes)}: weights, cache and that work space; the context for a "
                f"batch of {plan.batch}, the batch for {plan.context:,} tokens."
            )
        if model.positions is not None and plan.context > model.positions:
            notes.append(f"The model itself was made for {model.positions:,} tokens.")
        if sliding:
            notes.append(
                f"{sliding} sliding-window layers stay in {self.dtype}, whole, as the pipeline keeps them."
            )
        if model.other_layers:
            notes.append(f"{model.other_layers} layers without attention are not counted.")
        if not all(plan.exact for plan in self.plans):
            notes.append("About: how many tokens such a press keeps, in which head, depends on the text.")
        return notes


def memory(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Id, folder, config.json, or a shape such as layers=32,kv_heads=8,head_dim=128; left out, "
            "the default model."
        ),
    ] = None,
    press: Presses = None,
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens of each sequence.", min=1)] = 131072,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Sequences.", min=1)] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(help="Memory of a GPU, such as 80GB: also print the longest context and largest batch."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bytes of the weights where the configuration is wrong, such as 4.7GB.")
    ] = None,
) -> Sized:
    """Say what a cache will weigh, part by part, before a model is loaded."""
    from quantpress.evaluation.sizing.memory_plan import Planner
    from quantpress.evaluation.sizing.model_outline import outline
    from quantpress.presses.expression import parse_press

    made = [parse_press(one) for one in press or ("TurboQuant",)]
    available = None if gpu is None else byte_count(gpu)
    known = outline(model)
    if weights is not None:
        known = replace(known, weights_bytes=byte_count(weights), quantized=False)
    planners = [Planner(known, one) for one in (None, *(one for one in made if one is not None))]
    plans = tuple(planner.plan(context, batch) for planner in planners)
    capacities = (
        () if available is None else tuple(one.capacity(available, context, batch) for one in planners)
    )
    return Sized(known, plans, available, capacities)


def byte_count(text: str) -> int:
    """Read a number of bytes with its unit.

    Raises:
        InvalidInputError: `text` is not a number of bytes.

    Example:
        >>> byte_count("80GB"), byte_count("1.5 GiB"), byte_count("512")
        (80000000000, 1610612736, 512)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in UNITS.items()}
    unit = (found[2].lower() or "b") if found else ""
    if found is None or unit not in units or not float(found[1]):
        raise InvalidInputError(f"{text!r} is not a number of bytes; write it like 80GB, 24GiB or 512MB")
    return int(float(found[1]) * units[unit])
