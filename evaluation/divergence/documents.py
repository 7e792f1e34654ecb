"""Pieces of a book: a context that is read, and the continuation that is scored."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from quantpress.errors import InvalidInputError
from quantpress.pipelines.prompt import END_OF_CONTEXT, chat_form


@dataclass(frozen=True, eq=False)
class Document:
    """A text as token ids, in the user's turn of the model's chat form.

    Args:
        name: name, unique in a run.
        ids: [T + N] int64.
        context: T, number of tokens that are read under the press.
    """

    name: str
    ids: torch.Tensor
    context: int


@dataclass(frozen=True)
class Pieces:
    """How many documents to make of a text, and how long.

    Args:
        count: number of documents.
        context: T, tokens that are read.
        continuation: N, tokens that follow.
    """

    count: int
    context: int
    continuation: int


def make_documents(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, context: int, continuation: int
) -> list[Document]:
    """Cut pieces of equal length from a text, spread evenly and without overlap.

    Args:
        tokenizer: turns text into tokens; with a chat template, each piece begins as the user's turn does.
        text: running prose.
        count: number of pieces.
        context: T, tokens that are read, including what the chat form puts in front.
        continuation: N, tokens that follow.

    Raises:
        InvalidInputError: a count is too small, or the text is too short.
    """
    source = _Source.of(tokenizer, text)
    starts = source.starts(Pieces(count, context, continuation))
    return [source.document(f"piece {i + 1}", at, context, continuation) for i, at in enumerate(starts)]


def make_unread_documents(
    tokenizer: PreTrainedTokenizerBase, text: str, wanted: Pieces, read: Sequence[Pieces]
) -> list[Document]:
    """Cut pieces that overlap neither those that `make_documents` cuts from the text nor one another.

    Settings tuned on these pieces can be reported on those of `make_documents`.

    Args:
        tokenizer: as for `make_documents`.
        text: running prose.
        wanted: what to cut.
        read: what `make_documents` has cut, which must not overlap.

    Raises:
        InvalidInputError: a count is too small, or too little text is left.
    """
    source = _Source.of(tokenizer, text)
    own = source.own(wanted)
    taken = [(at, at + source.own(pieces)) for pieces in read for at in source.starts(pieces)]
    starts, at = [], 0
    for begin, end in sorted([*taken, (len(source.tokens), len(source.tokens))]):
        while at + own <= begin:
            starts.append(at)
            at += own
        at = max(at, end)
    if len(starts) < wanted.count:
        raise InvalidInputError(
            f"the text has room for {len(starts)} unread documents of {wanted.context} + "
            f"{wanted.continuation} tokens; ask for so many, not {wanted.count}, or for shorter ones"
        )
    chosen = [starts[i * len(starts) // wanted.count] for i in range(wanted.count)]
    return [
        source.document(f"unread {i + 1}", at, wanted.context, wanted.continuation)
        for i, at in enumerate(chosen)
    ]


@dataclass(frozen=True)
class _Source:
    """A text as token ids, and the ids that begin a user's turn."""

    before: list[int]
    tokens: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> "_Source":
        front = chat_form(tokenizer, END_OF_CONTEXT[:1])[0].removesuffix(END_OF_CONTEXT[:1])
        before = tokenizer.encode(front, add_special_tokens=False) if front else []
        return cls(before, tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def own(self, pieces: Pieces) -> int:
        """Number of tokens of the text in each piece."""
        if min(pieces.count, pieces.context) < 1 or pieces.continuation < 2:
            raise InvalidInputError(
                f"{pieces.count} documents of {pieces.context} + {pieces.continuation} tokens; give at least "
                "1 of 1 + 2 tokens"
            )
        return pieces.context + pieces.continuation - len(self.before)

    def starts(self, pieces: Pieces) -> list[int]:
        """Where evenly spread pieces begin."""
        own = self.own(pieces)
        if own <= pieces.continuation or own * pieces.count > len(self.tokens):
            raise InvalidInputError(
                f"{pieces.count} documents of {pieces.context} + {pieces.continuation} tokens need "
                f"{own * pieces.count} tokens of text and a context of more than {len(self.before)}; the "
                f"text has {len(self.tokens)}: ask for fewer or give more"
            )
        return [i * (len(self.tokens) // pieces.count) for i in range(pieces.count)]

    def document(self, name: str, at: int, context: int, continuation: int) -> Document:
        own = context + continuation - len(self.before)
        ids = [*self.before, *self.tokens[at : at + own]]
        return Document(name, torch.tensor(ids, dtype=torch.int64, device="cpu"), context)
