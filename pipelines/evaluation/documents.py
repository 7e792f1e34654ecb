"""Pieces of a book: a context that is read, and the continuation that is scored."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from quantpress.errors import InvalidInputError
from quantpress.pipelines.prompt import END_OF_CONTEXT, chat_form


@dataclass(frozen=True, eq=False)
class Document:
    """A text as token ids, in the user's turn of the model's chat form.

    Args:
        name: unique in a run.
        ids: [T + N] int64.
        context: T, how many of them are read under the press.
    """

    name: str
    ids: torch.Tensor
    context: int


def make_documents(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, context: int, continuation: int
) -> list[Document]:
    """Equally long pieces, spread evenly over a text, none overlapping another.

    Args:
        tokenizer: with a chat template, each piece begins as the user's turn does.
        text: running prose.
        count: how many.
        context: T, tokens that are read, what the chat form puts in front included.
        continuation: N, tokens that follow.

    Raises:
        InvalidInputError: a count is too small, or the text too short.
    """
    if min(count, context) < 1 or continuation < 2:
        raise InvalidInputError(
            f"{count} documents of {context} + {continuation} tokens; give at least 1 of 1 + 2 tokens"
        )
    front = chat_form(tokenizer, END_OF_CONTEXT[:1])[0].removesuffix(END_OF_CONTEXT[:1])
    before = tokenizer.encode(front, add_special_tokens=False) if front else []
    tokens = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    own = context + continuation - len(before)
    if own <= continuation or own * count > len(tokens):
        raise InvalidInputError(
            f"{count} documents of {context} + {continuation} tokens need {own * count} tokens of text and "
            f"a context of more than {len(before)}; the text has {len(tokens)}: ask for fewer or give more"
        )
    stride = len(tokens) // count
    return [
        Document(f"piece {i + 1}", torch.tensor([*before, *tokens[i * stride : i * stride + own]]), context)
        for i in range(count)
    ]
