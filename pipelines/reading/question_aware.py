"""What is read under a press, and what is asked afterwards, with the question in view of the press or not."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from quantpress.errors import InvalidInputError
from quantpress.presses.base_press import BasePress
from quantpress.presses.traits import members, traits_of, with_inner

IdsRead: TypeAlias = tuple[torch.Tensor, list[torch.Tensor]]
"""Ids [1, T] that are read under a press, and ids [1, Q] of what is fed afterwards, each to be answered."""


def question_aware_readings(
    context_ids: torch.Tensor, questions_ids: Sequence[torch.Tensor], press: BasePress | None = None
) -> list[IdsRead]:
    """One reading for each question: context and question, but for the last token, which is fed afterwards.

    For Finch, the delimiter is put between the two, unless the context has it already.

    Args:
        context_ids: [1, T] int64.
        questions_ids: [1, Q] int64 each, Q at least 1, with all that stands between question and answer.
        press: the press that the readings are made under.

    Example:
        >>> context, question = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
        >>> question_aware_readings(context, [question])
        [(tensor([[1, 2, 3, 4]]), [tensor([[5]])])]
    """
    context_ids = torch.cat([context_ids, *_delimiter(context_ids, press)], dim=1)
    prompts = [torch.cat([context_ids, question], dim=1) for question in questions_ids]
    return [(prompt[:, :-1], [prompt[:, -1:]]) for prompt in prompts]


def check_question_aware(questions: int, cached: bool, cache: Any) -> None:
    """Refuse what holds a context without a question, or more than one reading.

    Args:
        questions: how many are asked.
        cached: whether the context was read before.
        cache: what is given as cache=.

    Raises:
        InvalidInputError: the context was read before, or there is one cache for several questions.
    """
    if cached:
        raise InvalidInputError(
            "question_aware=True reads the question together with the context, and this context was read "
            "before, without a question: give the text itself, or leave question_aware out"
        )
    if cache is not None and questions > 1:
        raise InvalidInputError(
            f"question_aware=True reads the context once for each of the {questions} questions, and cache= "
            "holds one reading: ask one question, or leave cache= out"
        )


def _delimiter(context_ids: torch.Tensor, press: BasePress | None) -> list[torch.Tensor]:
    inner = [one for member in members(press) for one in with_inner(member)]
    ids = {getattr(one, "delimiter_token_id", None) for one in inner if traits_of(one).needs_delimiter}
    return [context_ids.new_tensor([[one]]) for one in ids if one is not None and one not in context_ids]
