"""The texts that a model reads while its layers are measured."""

from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantpress.errors import EmptyContextError, InvalidInputError
from quantpress.evaluation.divergence.documents import (
    Document,
    Pieces,
    make_documents,
    make_unread_documents,
)
from quantpress.evaluation.suites import SUITES
from quantpress.evaluation.tasks.haystack import book_text
from quantpress.kernels.layout import PAGE_TOKENS
from quantpress.presses.models.positions import position_count
from quantpress.presses.turboquant import TurboQuant

BOOK = "Pride and Prejudice"
CONTEXT = 1024
"""Tokens of each piece that are packed."""

CONTINUATION = 129
"""Tokens behind each context; all but the first are predicted over it."""


def pieces_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | None,
    pieces: Pieces,
    press: TurboQuant,
) -> list[Document]:
    """Cut the pieces to read, shorter ones where the model has fewer positions.

    Args:
        model: decoder-only.
        tokenizer: the model's.
        texts: what to read, by name; None: pages of the book that no suite of the evaluation scores.
        pieces: what to read of all texts together.
        press: its windows say how long a context must be.

    Raises:
        EmptyContextError: `texts` is empty.
        InvalidInputError: a text is too short, or the contexts are too short for a page.
    """
    positions = position_count(model.config)
    if positions is not None and pieces.context + pieces.continuation > positions:
        pieces = replace(pieces, context=positions - pieces.continuation)
    least = press.sink_tokens + press.detect_sinks + press.recent_tokens + PAGE_TOKENS
    if pieces.context < least:
        raise InvalidInputError(
            f"a context of {pieces.context} tokens packs no page; give pieces of at least {least}"
        )
    if texts is None:
        scored = [Pieces(one.documents, one.context, one.continuation) for one in SUITES.values()]
        return make_unread_documents(tokenizer, book_text(), pieces, scored)
    if not texts:
        raise EmptyContextError("there is no text to read; give one")
    count = -(-pieces.count // len(texts))
    sizes = count, pieces.context, pieces.continuation
    made = {name: make_documents(tokenizer, text, *sizes) for name, text in texts.items()}
    return [replace(one, name=f"{name}, {one.name}") for name, several in made.items() for one in several]
