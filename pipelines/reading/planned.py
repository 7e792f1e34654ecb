"""A reading before it begins: the ids of the context, and how they will be read."""

from dataclasses import dataclass

import torch

from quantpress.presses.base_press import BasePress


@dataclass(frozen=True, eq=False)
class Reading:
    """What the cache of a context follows from, except for the model.

    Args:
        ids: [1, T] int64, the context in its chat form.
        after: what the chat form puts between a question and its answer.
        press: the press that it will be read under; None keeps the whole cache.
        chunk_tokens: as for `read_context`.
        progress: as for `read_context`.
    """

    ids: torch.Tensor
    after: str
    press: BasePress | None = None
    chunk_tokens: int | None = None
    progress: bool | None = None
