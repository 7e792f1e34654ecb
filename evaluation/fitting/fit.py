"""Widths of keys and values for each layer of a model, by what their errors cost: a `WidthPlan`."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantpress.cache.saved.config_fingerprint import config_fingerprint
from quantpress.cache.saved.width_plan import Errors, WidthPlan
from quantpress.errors import EmptyContextError, InvalidInputError
from quantpress.evaluation.divergence.documents import (
    Document,
    Pieces,
    make_documents,
    make_unread_documents,
)
from quantpress.evaluation.fitting.byte_budget import ByteBudget
from quantpress.evaluation.fitting.sensitivity import LayerErrors, sensitivities, steps_of
from quantpress.evaluation.results.records import Records
from quantpress.evaluation.sizing.model_outline import ModelOutline
from quantpress.evaluation.suites import SUITES
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.presses.models.eligibility import PACKABLE, check
from quantpress.presses.models.positions import position_count
from quantpress.presses.traits import short_repr
from quantpress.presses.turboquant import TurboQuant
from quantpress.quantization.budget import WHOLE_BITS

BOOK = "Pride and Prejudice"
DEFAULT_CONTEXT = 32768
"""Tokens of the context that the bytes are counted for."""

CONTINUATION = 129
"""Tokens behind each context; all but the first are predicted over it."""

DEFAULT_PIECES = Pieces(count=4, context=1024, continuation=CONTINUATION)
"""What the model reads: pieces, tokens of each that are packed, tokens that are predicted behind them."""

DEFAULT_WIDTHS = (2, 3, 4)
"""Widths to choose from: those that fused kernels read. Plain PyTorch reads 1 and 8 bits."""

_MEASURE = "sensitivity"


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
    """

    model: str
    text: str
    press: TurboQuant
    errors: Errors
    outline: ModelOutline
    fingerprint: Mapping[str, Any]

    def budget(self, context: int) -> ByteBudget:
        """The bytes of the packed layers for a context."""
        layers = [layer for layer in self.outline.layers if layer.index in self.errors]
        return ByteBudget(layers, self.press, context, self.outline.dtype)

    def plan(
        self, bits: float, context: int = DEFAULT_CONTEXT, widths: Sequence[int] = DEFAULT_WIDTHS
    ) -> WidthPlan:
        """The plan of least divergence within a budget.

        Args:
            bits: most bits a value of the packed layers at this context, in true bytes: codes, scales,
                statistics, and windows in 16 bits.
            context: tokens of the context.
            widths: the widths to choose from.

        Raises:
            InvalidInputError: the budget cannot be met, or a width was not measured.
        """
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0 < bits < float("inf"):
            raise InvalidInputError(f"bits is {bits!r}; give the bits a value, such as 2.5")
        budget = self.budget(context)
        chosen = budget.widths(among(self.errors, widths), int(bits * budget.numbers / 8))
        return WidthPlan(
            model=self.model,
            fingerprint=self.fingerprint,
            widths=chosen,
            text=self.text,
            press=short_repr(self.press),
            context=context,
            bits=budget.bits(chosen),
            errors=self.errors,
        )


def fit(
    model: PreTrainedModel,
    bits: float,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    context: int = DEFAULT_CONTEXT,
    widths: Sequence[int] = DEFAULT_WIDTHS,
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
    measured = measure(model, tokenizer, **options)
    return replace(measured.press, plan=measured.plan(bits, context, widths), bits=None)


def among(errors: Errors, widths: Sequence[int]) -> Errors:
    """The errors of some widths.

    Raises:
        InvalidInputError: there is no width, or one was not measured.
    """
    known = {bits for sides in errors.values() for side in sides for bits in side}
    if not widths or not known.issuperset(widths):
        raise InvalidInputError(
            f"widths are {', '.join(map(str, widths)) or 'none'}; choose from "
            f"{', '.join(map(str, sorted(known)))}"
        )
    return {
        index: ({bits: keys[bits] for bits in widths}, {bits: values[bits] for bits in widths})
        for index, (keys, values) in errors.items()
    }


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | None = None,
    press: TurboQuant | None = None,
    pieces: Pieces = DEFAULT_PIECES,
    *,
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
        pieces: what to read of all texts together.
        name: name of the model; None: its own.
        progress: True or False; None shows a bar in a terminal.
        partial: file that keeps the results of finished pieces; a call that was interrupted goes on from it.

    Raises:
        UnsupportedModelError: the model cannot be packed.
        InvalidInputError: a text is too short, or the press cannot be used.
    """
    check(model, PACKABLE)
    press = _without_widths(TurboQuant.preset("small") if press is None else press)
    documents = _documents(model, tokenizer, texts, pieces)
    fingerprint = config_fingerprint(model.config)
    name = name or Path(str(getattr(model, "name_or_path", ""))).name or type(model).__name__
    ids = hashlib.sha256(b"".join(document.ids.numpy().tobytes() for document in documents)).hexdigest()
    settings = {"model": name, "fingerprint": fingerprint, "press": short_repr(press), "ids": ids}
    records = None if partial is None else Records(partial, settings)
    bar = tqdm(
        total=len(documents) * steps_of(),
        desc="measuring",
        unit="step",
        leave=False,
        disable=None if progress is None else not progress,
    )
    found = []
    with bar:
        for document in documents:
            found.append(_of_document(model, document, press, records, bar))
    text = ", ".join(texts) if texts else BOOK
    return Measured(name, text, press, _mean(found), ModelOutline.of(name, model), fingerprint)


def _without_widths(press: TurboQuant) -> TurboQuant:
    """The press with nothing that decides widths."""
    if not isinstance(press, TurboQuant):
        raise InvalidInputError(f"press is {press!r}; give a TurboQuant, whose windows are used")
    for name in ("layer_bits", "boundary_layers", "codec", "plan"):
        if getattr(press, name):
            raise InvalidInputError(f"{name} decides widths, which are to be fitted; leave it out")
    return replace(press, bits=None, key_bits=None, value_bits=None)


def _documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | None,
    pieces: Pieces,
) -> list[Document]:
    positions = position_count(model.config)
    if positions is not None and pieces.context + pieces.continuation > positions:
        pieces = replace(pieces, context=positions - pieces.continuation)
    if texts is None:
        scored = [Pieces(one.documents, one.context, one.continuation) for one in SUITES.values()]
        return make_unread_documents(tokenizer, book_text(), pieces, scored)
    if not texts:
        raise EmptyContextError("there is no text to read; give one")
    count = -(-pieces.count // len(texts))
    sizes = count, pieces.context, pieces.continuation
    made = {name: make_documents(tokenizer, text, *sizes) for name, text in texts.items()}
    return [replace(one, name=f"{name}, {one.name}") for name, several in made.items() for one in several]


def _of_document(
    model: PreTrainedModel,
    document: Document,
    press: TurboQuant,
    records: Records | None,
    bar: Any,
) -> dict[int, LayerErrors]:
    """The errors of one document, from the file where it has them already."""
    if records is not None and records.has(_MEASURE, "", document.name):
        line = next(line for line in records.of(_MEASURE) if line["case"] == document.name)
        bar.update(steps_of())
        return {
            int(index): tuple({int(bits): error for bits, error in side.items()} for side in sides)  # type: ignore[misc]
            for index, sides in line["errors"].items()
        }
    found = sensitivities(model, document, press, WHOLE_BITS, step=bar.update)
    if records is not None:
        records.add(_MEASURE, "", document.name, errors=found)
    return found


def _mean(found: Sequence[Mapping[int, LayerErrors]]) -> dict[int, LayerErrors]:
    sums: dict[int, LayerErrors] = defaultdict(lambda: ({}, {}))
    for one in found:
        for index, sides in one.items():
            for total, by_width in zip(sums[index], sides, strict=True):
                for bits, error in by_width.items():
                    total[bits] = total.get(bits, 0.0) + error / len(found)
    return dict(sums)
