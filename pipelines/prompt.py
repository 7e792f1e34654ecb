"""From text to token ids: the context and the questions that follow it, in the model's chat form."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from quantpress.errors import ContextTooLongError, EmptyContextError, InvalidInputError
from quantpress.presses.models.positions import position_count

logger = logging.getLogger(__name__)
END_OF_CONTEXT = "<|end of context|>"


def chat_form(tokenizer: PreTrainedTokenizerBase, context: str, **template: Any) -> tuple[str, str]:
    """The context as the beginning of the user's turn, and what ends that turn and opens the answer.

    Args:
        tokenizer: if it has no chat template, the context starts with its bos token, if any, and ends with a
            line break.
        context: the text to be read.
        **template: options of the chat template, such as enable_thinking.

    Returns:
        (everything before the question, everything after it).

    Raises:
        EmptyContextError: the context is empty or only white space.
        InvalidInputError: the context is not a str, or the chat template does not show it exactly once.
    """
    if not isinstance(context, str):
        raise InvalidInputError(f"the context is a {type(context).__name__}; give a str, or a list of them")
    if not context.strip():
        raise EmptyContextError(f"the context is {context[:20]!r}; give the text to be asked about")
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + context, "\n"
    end = END_OF_CONTEXT
    while end in context:
        end += ">"
    turn = [{"role": "user", "content": context + end}]
    text = str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False, **template))
    if text.count(end) != 1:
        raise InvalidInputError(f"the chat template shows the user's text {text.count(end)} times, not once")
    before, _, after = text.partition(end)
    return before, after


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, what: str) -> torch.Tensor:
    """[1, T] int64 ids of a text, without added special tokens.

    Raises:
        EmptyContextError: the text has no token; `what` names the text in the message.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise EmptyContextError(f"the {what} {text[:20]!r} has no token; give more text")
    return torch.tensor([ids], dtype=torch.long, device="cpu")


def cut_to(context_ids: torch.Tensor, max_tokens: int | None) -> torch.Tensor:
    """The first `max_tokens` of the context, with a warning if that leaves some out.

    Args:
        context_ids: [1, T] ids of the context.
        max_tokens: at least 1; None keeps all.

    Raises:
        InvalidInputError: max_tokens is below 1.
    """
    if max_tokens is None:
        return context_ids
    if max_tokens < 1:
        raise InvalidInputError(f"max_context_length is {max_tokens}; give 1 or more tokens")
    tokens = context_ids.shape[1]
    if tokens > max_tokens:
        logger.warning("Context length has been truncated from %d to %d tokens.", tokens, max_tokens)
    return context_ids[:, :max_tokens]


def check_positions(config: PreTrainedConfig, tokens: int) -> None:
    """Refuse a context that is longer than the model's positions: answers would be noise.

    Raises:
        ContextTooLongError: the context is too long; the message names both numbers.
    """
    positions = position_count(config)
    if positions is not None and tokens > positions:
        raise ContextTooLongError(
            f"the context has {tokens} tokens, the model has {positions} positions; "
            f"max_context_length={positions} (or less, to leave room for the answer) cuts the end off"
        )


def warn_of_positions(
    config: PreTrainedConfig, context: torch.Tensor, questions: Sequence[torch.Tensor], new_tokens: int
) -> None:
    """Warn if question and answer may need more positions than the model has.

    Args:
        config: the model's configuration.
        context: [1, T] ids of the context.
        questions: [1, Q] ids of each question.
        new_tokens: the largest number of tokens in an answer.
    """
    positions = position_count(config)
    needed = context.shape[1] + max(ids.shape[1] for ids in questions) + new_tokens
    if positions is not None and needed > positions:
        warnings.warn(
            f"context, question and {new_tokens} new tokens need up to {needed} positions, the model has "
            f"{positions}: the end of an answer may be noise; a smaller max_context_length makes room",
            stacklevel=2,
        )
