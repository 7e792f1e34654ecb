"""`quantpress inspect`: which layers of a model will be packed, what its keys are like, a setting for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quantpress.cli.arguments import Device, Dtype, check_loading, read_text
from quantpress.cli.engines.profile import Profile
from quantpress.cli.models.fit import Fitted
from quantpress.cli.output import Outcome, new_table, one_below_the_other, progress
from quantpress.errors import InvalidInputError, QuantPressError

if TYPE_CHECKING:
    import torch

    from quantpress.evaluation.key_statistics import KeyStatistics
    from quantpress.evaluation.sizing.model_outline import LayerOutline
    from quantpress.pipelines.text_generation import TextGenerationPipeline

CANDIDATES = ("TurboQuant(bits=3)", "TurboQuant(bits=4)", "TurboQuant(key_bits=8, value_bits=4)")

LEAST_TOKENS = 260
"""Fewest tokens of which a setting packs a page: the first ones and the recent ones stay as they are."""

UNTRIED = "TurboQuant"
"""What is suggested where no setting could be tried."""

ENOUGH_TOP1 = 0.9
"""Share of the queries whose best token must stay the same for a setting to be suggested."""


@dataclass(frozen=True)
class Layer:
    """One attention layer.

    Args:
        index: index of the layer.
        kind: "full" or "sliding"; with ", state" where the layer keeps a state beside its tokens.
        kv_heads: number of KV heads.
        head_dim: dimension of the keys.
        value_dim: dimension of the values.
        packed: whether TurboQuant packs it.
        reason: why it does not; empty when it does.
        keys: statistics of its keys; None where they are not known.
    """

    index: int
    kind: str
    kv_heads: int
    head_dim: int
    value_dim: int
    packed: bool
    reason: str
    keys: "KeyStatistics | None"


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried on the text.

    Args:
        press: as it is written.
        bits_per_value: true bits of a packed number.
        top1: share of the last queries whose best token stays the same, mean over layers.
        worst_top1: the same share in the worst layer.
        output_error: |o - o^| / |o| of the attention output, mean over layers.
    """

    press: str
    bits_per_value: float
    top1: float
    worst_top1: float
    output_error: float


@dataclass(frozen=True)
class Inspected(Outcome):
    """A model.

    Args:
        model: name of the model.
        architecture: name of its class.
        tokens: number of tokens that it read.
        layers: its attention layers.
        other_layers: number of layers without keys and values of their own.
        refusal: why nothing of it can be packed, or why no setting could be tried; None otherwise.
        candidates: settings that were tried, smallest first.
        suggestion: a press, as it is written; None where TurboQuant cannot be used.
        state_bytes: bytes of the states that layers keep for one sequence, whatever its length; None where
            they are not known.
    """

    model: str
    architecture: str
    tokens: int
    layers: tuple[Layer, ...]
    other_layers: int
    refusal: str | None
    candidates: tuple[Candidate, ...]
    suggestion: str | None
    state_bytes: int | None = 0

    def __rich__(self) -> RenderableType:
        from quantpress.evaluation.key_statistics import OUTLIER
        from quantpress.pipelines.report import format_bytes

        packed = sum(layer.packed for layer in self.layers)
        table = new_table(
            f"{self.model} ({self.architecture}): {packed} of {len(self.layers)} layers are packed",
            ("layer", "kind", "KV\nheads", "head_dim", "packed", "mean\nenergy", "worst\nhead", "outliers"),
            words=("kind", "packed"),
            caption=f"Keys of {self.tokens:,} tokens, without the first ones. Mean energy: the share of the "
            "keys' energy that all keys of a head have in common, which packing subtracts. Outliers: "
            f"channels of a head with more than {OUTLIER:g} times the mean energy, before and after that.",
        )
        for layer in self.layers:
            dims = str(layer.head_dim)
            dims += "" if layer.value_dim == layer.head_dim else f" / {layer.value_dim}"
            row = [str(layer.index), layer.kind, str(layer.kv_heads), dims]
            keys = layer.keys
            figures = ["", "", ""]
            if keys is not None:
                figures = [f"{keys.mean_energy:.0%}", f"{keys.worst_mean_energy:.0%}"]
                figures += [f"{keys.outliers:.1f} → {keys.centred_outliers:.1f}"]
            table.add_row(*row, "yes" if layer.packed else f"no: {layer.reason}", *figures)
        shown: list[RenderableType] = [table]
        if self.other_layers:
            others = f"{self.other_layers} layers have no keys and values of their own"
            shown.append(Text(f"{others} and are left as they are."))
        if self.state_bytes:
            size = format_bytes(self.state_bytes)
            shown.append(Text(f"States of {size} a sequence do not grow with the text."))
        if self.candidates:
            shown.append(_tried(self.candidates))
        if self.refusal is not None:
            shown.append(Text(self.refusal, "yellow"))
        if self.suggestion is not None:
            shown.append(Text(f"Suggested: --press {self.suggestion!r}", "bold"))
        return Group(*shown)


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Id or folder of a model, or a file of `quantpress calibrate` or `quantpress fit`; left "
            "out, the default model."
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="Text for the model to read; left out, a piece of a novel.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to read.", min=LEAST_TOKENS)] = 1024,
    device: Device = None,
    dtype: Dtype = None,
) -> Inspected | Profile | Fitted:
    """Look at a model: which layers will be packed, which not and why, its keys, a setting for it."""
    if model is not None and Path(model).is_file() and model.endswith(".json"):
        from quantpress.cache.saved.width_plan import WidthPlan

        return Fitted(model, WidthPlan.load(model))
    if model is not None and (Path(model).is_file() or model.endswith(".safetensors")):
        from quantpress.cache.saved.model_profile import ModelProfile

        return Profile.of(model, ModelProfile.load(model))
    text = None if file is None else read_text(file)
    check_loading(model, device, dtype)
    from quantpress.cli.loading import load_pipeline, model_name
    from quantpress.evaluation.key_statistics import key_statistics
    from quantpress.evaluation.sizing.model_outline import ModelOutline
    from quantpress.evaluation.tasks.haystack import book_piece
    from quantpress.pipelines.prompt import cut_to, token_ids
    from quantpress.presses.models.eligibility import LAYERED, why_not

    pipe = load_pipeline(model, device, dtype)
    text = book_piece(pipe.tokenizer, tokens) if text is None else text
    ids = cut_to(token_ids(pipe.tokenizer, text, "text"), tokens).to(pipe.model.device)
    outline = ModelOutline.of(model_name(pipe), pipe.model)
    keys = {} if why_not(pipe.model, LAYERED) or not outline.layers else key_statistics(pipe.model, ids)
    candidates: list[Candidate] = []
    refusal = outline.refusal
    if refusal is None:
        try:
            for text in progress(CANDIDATES, "trying", len(CANDIDATES)):
                candidates.append(_tried_on(pipe, ids, text, outline.layers[0].head_dim))
        except QuantPressError as error:
            refusal = f"No setting could be tried on this text: {error}"
    return Inspected(
        model=outline.name,
        architecture=outline.architecture,
        tokens=ids.shape[1],
        layers=tuple(_layer(layer, outline.refusal, keys.get(layer.index)) for layer in outline.layers),
        other_layers=outline.other_layers,
        refusal=refusal,
        candidates=tuple(candidates),
        suggestion=suggested(candidates) if outline.refusal is None else None,
        state_bytes=outline.state_bytes,
    )


def suggested(candidates: Sequence[Candidate]) -> str:
    """The smallest setting that keeps the best token of nine queries in ten, or else the most exact one.

    Where no setting could be tried, it is `UNTRIED`.
    """
    if not candidates:
        return UNTRIED
    return next((one.press for one in candidates if one.top1 >= ENOUGH_TOP1), candidates[-1].press)


def _tried_on(pipe: "TextGenerationPipeline", ids: "torch.Tensor", text: str, head_dim: int) -> Candidate:
    from quantpress.evaluation.attention_fidelity import attention_fidelity
    from quantpress.presses.expression import parse_press

    press: Any = parse_press(text)
    found = attention_fidelity(pipe.model, ids, press)
    return Candidate(
        press=text,
        bits_per_value=press.bits_per_value(head_dim),
        top1=found.mean("top1"),
        worst_top1=min(layer.top1 for layer in found.layers),
        output_error=found.mean("output_error"),
    )


def _layer(layer: "LayerOutline", refusal: str | None, keys: "KeyStatistics | None") -> Layer:
    from quantpress.presses.turboquant import TurboQuant

    reason = "a sliding window" if layer.sliding else ""
    if not reason and refusal is not None:
        reason = "this model's cache cannot be packed"
    if not reason:
        try:
            TurboQuant().layer_settings(layer.module, layer.head_dim, layer.value_dim, 0)
        except InvalidInputError as error:
            reason = str(error)
    shape = (layer.kv_heads, layer.head_dim, layer.value_dim)
    return Layer(layer.index, layer.kind, *shape, not reason, reason, keys)


def _tried(candidates: Sequence[Candidate]) -> Table:
    columns = ("press", "bits a\nvalue", "same best\ntoken", "worst\nlayer", "output\nerror")
    table = new_table(
        "Attention over packed keys beside exact attention, mean over layers", columns, columns[:1]
    )
    for one in candidates:
        figures = (one.top1, one.worst_top1, one.output_error)
        table.add_row(
            one_below_the_other(one.press),
            f"{one.bits_per_value:.3f}",
            *(f"{figure:.1%}" for figure in figures),
        )
    return table
