"""Widths of keys and values for each layer or head of a model, by what their errors cost: a `WidthPlan`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.cache.saved.width_plan import Error, heads_of
from quantpress.errors import InvalidInputError
from quantpress.evaluation.divergence.documents import Document, Pieces
from quantpress.evaluation.fitting import layer_by_layer as layerwise
from quantpress.evaluation.fitting import one_pass as gradients
from quantpress.evaluation.fitting.measured import (
    DEFAULT_CONTEXT,
    DEFAULT_WIDTHS,
    LAYER,
    By,
    Measured,
    check_by,
    sums,
)
from quantpress.evaluation.fitting.pieces import BOOK, CONTEXT, CONTINUATION, pieces_of
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.sizing.model_outline import ModelOutline
from quantpress.presses.models.eligibility import PACKABLE, check
from quantpress.presses.traits import short_repr
from quantpress.presses.turboquant import TurboQuant
from quantpress.quantization.budget import WHOLE_BITS

Method = Literal["layer-by-layer", "one-pass"]
LAYER_BY_LAYER, ONE_PASS = get_args(Method)
DEFAULT_METHOD: Method = "layer-by-layer"
PIECES = {LAYER_BY_LAYER: 2, ONE_PASS: 4}
"""Pieces that each method reads, unless told otherwise."""

_MEASURE = "error"


def fit(
    model: PreTrainedModel,
    bits: float,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    context: int = DEFAULT_CONTEXT,
    widths: Sequence[int] = DEFAULT_WIDTHS,
    by: By = LAYER,
    **options: Any,
) -> TurboQuant:
    """The work of `TurboQuant.fit`.

    Raises:
        InvalidInputError: as there; or there is no tokenizer of the model's name.
    """
    if tokenizer is None:
        name = getattr(model, "name_or_path", "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InvalidInputError(
                f"there is no tokenizer of the name {name!r} of this model; give tokenizer="
            ) from error
    measured = measure(model, tokenizer, widths=widths, by=by, **options)
    return replace(measured.press, plan=measured.plan(bits, context, widths, by), bits=None)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | None = None,
    press: TurboQuant | None = None,
    pieces: Pieces | None = None,
    *,
    method: Method = DEFAULT_METHOD,
    widths: Sequence[int] = DEFAULT_WIDTHS,
    by: By = LAYER,
    name: str | None = None,
    progress: bool | None = None,
    partial: Path | None = None,
) -> Measured:
    """Measure how much the packing of each layer's keys and values changes a model's predictions.

    Args:
        model: decoder-only.
        tokenizer: the model's.
        texts: what to read, by name; None: pages of the book that no suite of the evaluation scores.
        press: windows, rotation and all else but the widths; None: those of the presets.
        pieces: what to read of all texts together; None: 2 pieces of 1024 tokens layer by layer, 4 in one
            pass, and 128 predictions behind each.
        method: "layer-by-layer" measures the divergence, by predicting the text behind each piece once for
            each layer, side and width; "one-pass" estimates it from gradients, at every width.
        widths: the widths that may be chosen, which are measured layer by layer; 8 is measured with them.
        by: "layer" for one error of all KV heads of a layer, "head" for an error of each. Layer by layer,
            the text is then predicted once for each head.
        name: name of the model; None: its own.
        progress: True or False; None shows a bar in a terminal.
        partial: file that keeps what is finished; a call that was interrupted goes on from it.

    Raises:
        UnsupportedModelError: the model cannot be packed; or, in one pass, layers keep states beside tokens.
        InvalidInputError: a text is too short, or the press, the method, a width or `by` cannot be used.
    """
    check_by(by)
    if method not in PIECES:
        raise InvalidInputError(f"method is {method!r}; give one of {', '.join(PIECES)}")
    if not widths or not {*widths} <= {*WHOLE_BITS}:
        shown = ", ".join(map(str, widths)) or "none"
        raise InvalidInputError(f"widths are {shown}; choose from {', '.join(map(str, WHOLE_BITS))}")
    check(model, PACKABLE)
    press = _without_widths(TurboQuant.preset("small") if press is None else press)
    pieces = pieces or Pieces(PIECES[method], CONTEXT, CONTINUATION)
    documents = pieces_of(model, tokenizer, texts, pieces, press)
    fingerprint = config_fingerprint(model.config)
    name = name or Path(str(getattr(model, "name_or_path", ""))).name or type(model).__name__
    outline = ModelOutline.of(name, model)
    heads = {layer.index: layer.kv_heads for layer in outline.layers if not layer.sliding}
    parts = len(heads) if by == LAYER else sum(heads.values())
    ids = hashlib.sha256(b"".join(document.ids.numpy().tobytes() for document in documents)).hexdigest()
    settings = {"model": name, "fingerprint": fingerprint, "press": short_repr(press), "ids": ids}
    records = None if partial is None else Records(partial, {**settings, "method": method})
    steps = gradients.steps_of() if method == ONE_PASS else layerwise.steps_of(parts, widths)
    found = []
    with tqdm(
        total=len(documents) * steps,
        desc="measuring",
        unit="step",
        leave=False,
        disable=None if progress is None else not progress,
    ) as bar:
        for document in documents:
            kept = _kept(records, document)
            if method == ONE_PASS:
                found.append(_in_one_pass(model, document, press, kept, bar))
            else:
                sizes = list(heads), widths, kept, bar.update, None if by == LAYER else heads
                found.append(layerwise.layer_by_layer(model, document, press, *sizes))
    text = ", ".join(texts) if texts else BOOK
    errors = sums(_mean(found)) if by == LAYER else _mean(found)
    return Measured(name, text, press, errors, outline, fingerprint, method)


def _without_widths(press: TurboQuant) -> TurboQuant:
    """The press with nothing that decides widths."""
    if not isinstance(press, TurboQuant):
        raise InvalidInputError(f"press is {short_repr(press)}; give a TurboQuant, whose windows are used")
    for name in ("layer_bits", "boundary_layers", "codec", "plan"):
        if getattr(press, name):
            raise InvalidInputError(f"{name} decides widths, which are to be fitted; leave it out")
    return replace(press, bits=None, key_bits=None, value_bits=None)


def _kept(records: Records | None, document: Document) -> layerwise.Kept:
    """Results of a document by name, from the file where it has them already."""
    if records is None:
        return lambda name, work: work()
    known = {line["case"]: line["value"] for line in records.of(_MEASURE, document.name)}

    def kept(name: str, work: Any) -> Any:
        if name not in known:
            known[name] = work()
            records.add(_MEASURE, document.name, name, value=known[name])
        return known[name]

    return kept


def _in_one_pass(
    model: PreTrainedModel, document: Document, press: TurboQuant, kept: layerwise.Kept, bar: Any
) -> dict[int, gradients.LayerErrors]:
    begun = bar.n
    found = kept(
        "every width by head",
        lambda: gradients.one_pass(model, document, press, WHOLE_BITS, step=bar.update),
    )
    bar.update(begun + gradients.steps_of() - bar.n)  # where nothing was left to do

    def side(by_width: Mapping[Any, Sequence[float]]) -> dict[int, Error]:
        return {int(bits): tuple(heads) for bits, heads in by_width.items()}

    return {int(index): (side(keys), side(values)) for index, (keys, values) in found.items()}


def _mean(found: Sequence[Mapping[int, gradients.LayerErrors]]) -> dict[int, gradients.LayerErrors]:
    """Means over documents. A mean below 0 is noise of an error too small to be measured, and counts as 0."""

    def mean(index: int, side: int) -> dict[int, Error]:
        every = [one[index][side] for one in found]
        means: dict[int, Error] = {}
        for bits, like in sorted(every[0].items()):
            heads = zip(*(heads_of(one[bits]) for one in every), strict=True)
            clipped = tuple(max(0.0, sum(one) / len(every)) for one in heads)
            means[bits] = clipped if isinstance(like, tuple) else clipped[0]
        return means

    return {index: (mean(index, 0), mean(index, 1)) for index in found[0]}
