"""Kernels of ours stand in for proven pieces of a model, in a captured step and while a context is read."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from quantpress.cache.ranks import ranks_of
from quantpress.kernels.available import runs_triton
from quantpress.pipelines.joined.piece import JoinedPiece
from quantpress.pipelines.joined.pieces import pieces_of
from quantpress.pipelines.joined.residual_sums import ResidualSums
from quantpress.pipelines.joined.seams import replaced_here


class JoinedStep:
    """The pieces of one model.

    Args:
        model: the model. Nothing is left on it, and its own code stays as it is.
        forward: the model's own forward, which the steps call.
        products: whether linear layers are among the pieces.

    Attributes:
        joined: how many pieces of each kind a kernel stood in for, in the last `joining`.
    """

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], products: bool = True) -> None:
        self._model, self._forward = model, forward
        self._sums = ResidualSums() if products else None
        self.joined: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, this thread's step runs the model's own code, and each piece of it is proven."""
        with self._sums or nullcontext(), replaced_here([(one.named, one.watch) for one in self._pieces()]):
            yield

    @contextmanager
    def joining(self) -> Iterator[None]:
        """While inside, this thread's step runs through the kernels that are proven."""
        pieces = [piece for piece in self._pieces() if piece.proven]
        self.joined = dict(Counter(piece.kind for piece in pieces))
        with self._sums or nullcontext(), replaced_here([(piece.named, piece.run) for piece in pieces]):
            yield

    def _pieces(self) -> list[JoinedPiece]:
        return [*pieces_of(self._model, self._sums)] if _possible(self._model, self._forward) else []


@contextmanager
def joined_reading(model: PreTrainedModel, forward: Callable[..., Any] | None = None) -> Iterator[None]:
    """While inside, this thread's forwards over many tokens run norms, gates and rotary positions by kernels.

    These give what the model's own code gives, to the last bit. Each is proven at its first call, and then
    holds for any number of tokens from `MANY_ROWS` on. Linear layers stay PyTorch's. Nothing happens where
    gradients are recorded, nor where a step could not be joined.

    Args:
        model: the model. Nothing is left on it.
        forward: its own forward; None: what it has as such, behind what `captured_decoding` put there.
    """
    own = getattr(model.forward, "original", model.forward) if forward is None else forward
    if torch.is_grad_enabled() or not _possible(model, own):
        yield
        return
    with replaced_here([(piece.named, piece.read) for piece in pieces_of(model, None)]):
        yield


def _possible(model: PreTrainedModel, forward: Callable[..., Any]) -> bool:
    """On one GPU; not under autocast, where modules compute in other dtypes, nor in compiled modules."""
    device = model.device
    if not runs_triton(device) or torch.is_autocast_enabled(device.type) or ranks_of(model) is not None:
        return False
    compiled = any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
    return not compiled and not hasattr(forward, "_torchdynamo_orig_callable")
