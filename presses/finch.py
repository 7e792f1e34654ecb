"""Finch, with a delimiter that the model never sees, and errors where it is not in its place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kvpress
import torch

from quantpress.errors import InvalidInputError
from quantpress.presses.declaration import EvictingPress

FINCH_DELIMITER = "<|finch_sep|>"
"""kvpress's own."""


def name_delimiter(press: kvpress.FinchPress, tokenizer: Any, token: str = FINCH_DELIMITER) -> int:
    """Tell Finch its delimiter, which becomes a token of the tokenizer; the token's id."""
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([token], special_tokens=True)
    known = int(tokenizer.convert_tokens_to_ids(token))
    press.delimiter_token, press.delimiter_token_id = token, known
    return known


class Finch(EvictingPress, kvpress.FinchPress, rerotates=lambda press: press.rerotate_keys):
    """Prompt-guided: the tokens that the question behind a delimiter attends to (FINCH).

    The context is f"{context}<|finch_sep|>{question}". A pipeline makes that delimiter a token; anywhere else
    call `press.update_model_and_tokenizer(model, tokenizer)` first. The model never sees it.
    """

    def update_model_and_tokenizer(
        self, model: Any, tokenizer: Any, delimiter_token: str = FINCH_DELIMITER
    ) -> Any:
        """Make the delimiter a token. Unlike kvpress's, this leaves the model as it is.

        Args:
            model: not used.
            tokenizer: gets the token, if it has none of this name.
            delimiter_token: how it is written.

        Returns:
            The tokenizer.
        """
        name_delimiter(self, tokenizer, delimiter_token)
        return tokenizer

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        """Compress every prefill inside the context.

        Raises:
            InvalidInputError: no delimiter is known; at a prefill: it is not there once, before the end.
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
        """kvpress's own.

        Raises:
            InvalidInputError: the context has no delimiter.
        """
        if self.compression_ratio and self.window_size is None:
            raise self._misplaced("is not in the context")
        return super().compress(module, *args, **kwargs)

    def _take_delimiter(self, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """Forward pre-hook of the embedding: the window is what stands behind the delimiter."""
        ids = args[0]
        if ids.shape[1] == 1:
            return None  # a decode step
        found = (ids == self.delimiter_token_id).nonzero()
        self.window_size = None
        if not len(found):
            return None
        if len(ids) > 1:
            raise InvalidInputError(f"Finch compresses one context at a time, got a batch of {len(ids)}")
        place = int(found[0, 1])
        if len(found) > 1:
            raise self._misplaced(f"stands in {len(found)} places")
        if place == ids.shape[1] - 1:
            raise self._misplaced("has no question behind it")
        self.window_size = ids.shape[1] - 1 - place
        return (torch.cat((ids[:, :place], ids[:, place + 1 :]), dim=1),)

    def _misplaced(self, how: str) -> InvalidInputError:
        delimiter = self.delimiter_token or f"the token {self.delimiter_token_id}"
        return InvalidInputError(
            f"Finch: the delimiter {delimiter!r} {how}; put it once between the context and the question, "
            "as in context + delimiter + question"
        )
