"""`quantpress memory`: what a cache will weigh, and what fits on a GPU."""

import gc
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quantpress.cli.arguments import Presses, byte_count
from quantpress.cli.engines.memory import MAX_NUM_SEQS, EngineSized, check_options
from quantpress.cli.output import Outcome

if TYPE_CHECKING:
    from quantpress.evaluation.sizing.known_models import KnownModel
    from quantpress.evaluation.sizing.memory_plan import Capacity, MemoryPlan
    from quantpress.evaluation.sizing.model_outline import ModelOutline


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
            "repository": self.model.repository,
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
        tables = [self._cache(), *([self._sums()] if self.plans[0].total_bytes is not None else [])]
        return Group(*tables, *(Text(line, "dim") for line in self._notes()))

    def _cache(self) -> Table:
        """The cache of each press, part by part."""
        from quantpress.pipelines.report import format_bytes

        first = self.plans[0]
        sequences = "" if first.batch == 1 else f", {first.batch} sequences"
        title = f"{self.model.name}: {first.context:,} tokens{sequences}"
        states = ["states"] if first.cache.state_bytes else []
        names = ["codes", "unpacked\ntokens", "metadata", *states, "in all", "ratio", "bits a\nvalue"]
        table = _table(Text(title, overflow="fold"), names)
        for plan in self.plans:
            cache = plan.cache
            parts = [cache.packed_bytes, cache.dense_bytes, cache.metadata_bytes]
            parts += [*([cache.state_bytes] if states else []), cache.total_bytes]
            ratios = f"{plan.ratio:.2f}x", f"{cache.bits_per_value:.2f}"
            table.add_row(_press(plan), *map(format_bytes, parts), *ratios)
        return table

    def _sums(self) -> Table:
        """What each press takes with its work space and the weights, and what fits."""
        from quantpress.pipelines.report import format_bytes

        names = ["cache", "work space", "with\nweights"]
        names += ["longest\ncontext", "largest\nbatch"] if self.capacities else []
        table = _table(Text("While the context is read"), names)
        for index, plan in enumerate(self.plans):
            sizes = (plan.cache.total_bytes, plan.activation_bytes, plan.total_bytes)
            row = [format_bytes(size or 0) for size in sizes]
            for capacity in self.capacities[index : index + 1]:
                row += [f"{capacity.context:,}", f"{capacity.batch:,}"]
            table.add_row(_press(plan), *row)
        return table

    def _notes(self) -> list[str]:
        from quantpress.pipelines.report import format_bytes

        model, plan = self.model, self.plans[0]
        sliding = sum(layer.sliding for layer in model.layers)
        notes = [f"The ratio is to all tokens uncompressed, in {self.dtype}."]
        if model.repository is not None:
            notes.append(f"The shape is that of {model.repository}.")
        if model.weights_bytes is not None:
            notes.append(f"Weights: {format_bytes(model.weights_bytes)} in {self.dtype}.")
            if model.quantized:
                notes.append("The checkpoint is quantized and weighs less: say how much with --weights.")
        if plan.total_bytes is not None:
            notes.append("With weights: the sum of cache, work space (an estimate) and weights.")
        if self.gpu_bytes is not None:
            notes.append(
                f"What fits in {self.gpu_bytes / 1e9:,.1f} GB ({format_bytes(self.gpu_bytes)}): the longest "
                f"context for a batch of {plan.batch}, the largest batch for {plan.context:,} tokens."
            )
        notes.append("1 GB is 10^9 bytes, 1 GiB is 2^30 bytes (1.07 GB).")
        if model.positions is not None and plan.context > model.positions:
            notes.append(f"The model itself was made for {model.positions:,} tokens.")
        if sliding:
            notes.append(
                f"{sliding} sliding-window layers stay in {self.dtype}, whole, as the pipeline keeps them."
            )
        if plan.cache.state_bytes:
            grows = sum(not layer.sliding for layer in model.layers)
            share = plan.cache.state_bytes / plan.whole_bytes
            notes.append(
                f"States have the same size for every text, {share:.1%} of the whole cache here. Only the "
                f"{grows} layers of full attention grow without end, and they alone are packed."
            )
        elif model.other_layers:
            notes.append(f"{model.other_layers} layers without keys and values of their own are not counted.")
        if not all(plan.exact for plan in self.plans):
            notes.append("* About: how many tokens such a press keeps, in which head, depends on the text.")
        return notes


@dataclass(frozen=True)
class Known(Outcome):
    """The models that are known by name.

    Args:
        models: in the order of the table.
    """

    models: "tuple[KnownModel, ...]"

    def __rich__(self) -> RenderableType:
        table = Table()
        table.add_column("name", overflow="fold")
        table.add_column("shape and weights of", overflow="fold")
        table.add_column("parameters", justify="right", overflow="fold")
        for one in self.models:
            table.add_row(one.name, one.repository, f"{one.parameters / 1e9:.2f} billion")
        return table


def _press(plan: "MemoryPlan") -> Text:
    return Text(plan.press + ("" if plan.exact else " *"))


def _table(title: Text, names: list[str]) -> Table:
    """A table with a row for each press; in a narrow terminal its cells are folded, never cropped."""
    table = Table(title=title)
    table.add_column("press", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    return table


def memory(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A name such as llama-3.1-8b (see --list), an id on the hub, a folder, a config.json, or a "
            "shape such as layers=32,kv_heads=8,head_dim=128; left out, the default model."
        ),
    ] = None,
    press: Presses = None,
    context: Annotated[int, typer.Option("--context", "-c", help="Tokens of each sequence.", min=1)] = 131072,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Sequences.", min=1)] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Memory of a GPU, such as 80GB or 24GiB: also print the longest context and largest batch. "
            "1 GB is 10^9 bytes, 1 GiB is 2^30 bytes; nvidia-smi counts in MiB, 1024 to a GiB."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Bytes of the weights where the configuration is wrong, such as 4.7GB.")
    ] = None,
    engine: Annotated[
        Literal["vllm"] | None,
        typer.Option(help="Plan for vLLM with the plugin, which packs its blocks."),
    ] = None,
    kv_cache_dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="With --engine: such as quantpress_4bit or quantpress_k4v3; may be repeated; left out, 4, 3 "
            "and 2 bits."
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help="With --engine: most sequences at a time, as vLLM is told; left out, 64.", min=1),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(help="With --engine: a file of `quantpress fit`, with the widths of each layer."),
    ] = None,
    names: Annotated[
        bool, typer.Option("--list", help="List the models that are known by name, without the hub.")
    ] = False,
) -> Sized | EngineSized | Known:
    """Say what a cache will weigh, part by part, before a model is loaded."""
    from quantpress.evaluation.sizing.known_models import known_models

    if names:
        return Known(tuple(known_models().values()))
    check_options(engine, press, kv_cache_dtype, max_num_seqs, plan)
    available, own_weights = (None if one is None else byte_count(one) for one in (gpu, weights))
    _import_quickly()
    from quantpress.evaluation.sizing.memory_plan import Planner
    from quantpress.evaluation.sizing.model_outline import outline
    from quantpress.presses.expression import parse_press

    made = [parse_press(one) for one in press or ("TurboQuant",)]
    known = outline(model)
    if own_weights is not None:
        known = replace(known, weights_bytes=own_weights, quantized=False)
    if engine is not None:
        from quantpress.evaluation.sizing.engine_plan import EngineAsked

        asked = EngineAsked(context, batch, max_num_seqs or MAX_NUM_SEQS, available)
        return EngineSized.of(known, asked, kv_cache_dtype, plan)
    planners = [Planner(known, one) for one in (None, *(one for one in made if one is not None))]
    plans = tuple(planner.plan(context, batch) for planner in planners)
    capacities = (
        () if available is None else tuple(one.capacity(available, context, batch) for one in planners)
    )
    return Sized(known, plans, available, capacities)


def _import_quickly() -> None:
    """Import torch and transformers without the garbage collector, which finds nothing there.

    It would take a third of the command's time, at the exit too.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import_module("quantpress.evaluation.sizing.memory_plan")
    finally:
        gc.enable()
        gc.freeze()
