"""Failures of kvpress's presses at a prefill, as errors that name the press, the tokens and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from kvpress import BasePress

from quantpress.errors import InvalidInputError, QuantPressError
from quantpress.presses.base import short_repr

SHORT_TOKENS = 64
"""With fewer tokens kvpress's presses fail in many ways: windows, sinks and chunks find nothing there."""

UNEXPLAINED = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What kvpress's presses raise in the middle of a prefill that they were not made for."""


@contextmanager
def named_failure(press: BasePress, tokens: int) -> Iterator[None]:
    """Name the press and the remedy where a press fails at a prefill of so many tokens.

    kvpress asserts what a press needs of a context, mostly its length; what else a press raises is taken for
    the same where the context is short. Presses of others say for themselves what they raise.

    Raises:
        InvalidInputError: in the place of the press's exception.
    """
    try:
        with named_assertion(press, tokens):
            yield
    except (QuantPressError, torch.OutOfMemoryError):
        raise
    except UNEXPLAINED as error:
        if tokens >= SHORT_TOKENS or not _of_kvpress(press):
            raise
        raise _cannot_compress(press, tokens, f"{type(error).__name__}: {error}") from error


@contextmanager
def named_assertion(press: BasePress | None, tokens: int) -> Iterator[None]:
    """The part of `named_failure` that may stand around a whole prefill: only presses assert there."""
    try:
        yield
    except AssertionError as error:
        if press is None:
            raise
        raise _cannot_compress(press, tokens, str(error)) from error


def _of_kvpress(press: BasePress) -> bool:
    return type(press).__module__.split(".")[0] in ("kvpress", "quantpress")


def _cannot_compress(press: BasePress, tokens: int, reason: str) -> InvalidInputError:
    return InvalidInputError(
        f"{short_repr(press)} cannot compress this context of {tokens} tokens: {reason.rstrip('.')}. "
        "Give a longer context, a press with smaller windows, or press=None"
    )
