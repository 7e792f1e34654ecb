"""Finch, with a delimiter that the model never sees, and errors that say where it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kvpress
import torch

from quantpress.errors import InvalidInputError
from quantpress.presses.base import EvictingPress

FINCH_DELIMITER = "<|finch_sep|>"
"""kvpress's own."""


def name_delimiter(press: kvpress.FinchPress, tokenizer: Any, token: str = FINCH_DELIMITER) -> int:
    """Make the delimiter a token of the tokenizer, tell Finch, and return the token's id."""
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([token], special_tokens=True)
    known = int(tokenizer.convert_tokens_to_ids(token))
    press.delimiter_token, press.delimiter_token_id = token, known
    return known


class Finch(
    EvictingPress,
    kvpress.FinchPress,
    rerotates=lambda press: press.rerotate_keys,
    needs_delimiter=True,
    like_llama=True,
    takes_weights=True,
):
    """Keeps the tokens that the question behind a delimiter attends to (FINCH).

    The context is f"{context}<|finch_sep|>{question}". A pipeline makes the delimiter a token. Anywhere else,
    call `press.update_model_and_tokenizer(model, tokenizer)` first. The model never sees the delimiter.
    """

    def update_model_and_tokenizer(
        self, model: Any, tokenizer: Any, delimiter_token: str = FINCH_DELIMITER
    ) -> Any:
        """Make the delimiter a token. Unlike kvpress's method, this leaves the model as it is.

        Args:
            model: not used.
            tokenizer: the token is added to it, unless it has the token already.
            delimiter_token: the delimiter's text.

        Returns:
            The tokenizer.
        """
        name_delimiter(self, tokenizer, delimiter_token)
        return tokenizer

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Compress every prefill inside the context.

        Raises:
            InvalidInputError: no delimiter is known; or, at a prefill, the delimiter does not stand exactly
                once in the context, before the last token.
        """
        if self.delimiter_token_id is None:
            raise InvalidInputError(
                "Finch knows no delimiter: call press.update_model_and_tokenizer(model, tokenizer), and put "
                "press.delimiter_token between the context and the question"
            )
        with super().__call__(model):
            handle = model.model.embed_tokens.register_forward_pre_hook(self._take_delimiter)
            try:
                yield
            finally:
                handle.remove()

    def compress(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Call kvpress's own method.

        Raises:
            InvalidInputError: the context has no delimiter.
        """
        if self.compression_ratio and self.window_size is None:
            raise self._misplaced("is not in the context")
        return super().compress(module, *args, **kwargs)

    def _take_delimiter(self, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Forward pre-hook of the embedding: take the delimiter out; the window is what follows it."""
        ids = args[0]
        if ids.shape[1] == 1:
            return None  # a decode step
        found = (ids == self.delimiter_token_id).nonzero()
        self.window_size = None
        if not len(found):
            return None
        if len(ids) > 1:
            raise InvalidInputError(f"Finch compresses one context at a time, got a batch of {len(ids)}")
        index = int(found[0, 1])
        if len(found) > 1:
            raise self._misplaced(f"stands in {len(found)} places")
        if index == ids.shape[1] - 1:
            raise self._misplaced("has no question behind it")
        self.window_size = ids.shape[1] - 1 - index
        return (torch.cat((ids[:, :index], ids[:, index + 1 :]), dim=1),)

    def _misplaced(self, how: str) -> InvalidInputError:
        delimiter = self.delimiter_token or f"the token {self.delimiter_token_id}"
        return InvalidInputError(
            f"Finch: the delimiter {delimiter!r} {how}; put it once between the context and the question, "
            "as in context + delimiter + question"
        )
