"""Keys and values compressed and restored inside every attention call of a model; no cache is touched."""

from collections.abc import Callable
from typing import Any

from torch import nn

from quantpress.errors import InvalidInputError, NotAppliedError, UnsupportedModelError
from quantpress.pipelines.patching.attention_functions import SDPA, TRIP, functions_taken_over
from quantpress.pipelines.patching.attention_record import AttentionRecord
from quantpress.pipelines.patching.round_trip import RoundTrip
from quantpress.pipelines.replaced import Replaced
from quantpress.presses.models.lock import model_lock

_STATE = "_quantpress_attention_patch"


def patch_attention(
    model: nn.Module, bits: float = 4, *, enabled: bool = True, **options: Any
) -> "AttentionPatch":
    """Let every attention call of a model work on keys and values that were packed and restored just before.

    Shows what a width does to a model, with or without a cache; a cache of the model keeps what it keeps.
    It saves no memory by itself: the record tells what packing could save. Attention is found in two places:
    transformers' attention functions, and torch.nn.functional.scaled_dot_product_attention, which diffusers
    and most other models call. Made for inference: no gradient reaches keys and values.

    Args:
        model: any module; calls of its forward are patched, in the thread that makes them.
        bits: code width of keys and values.
        enabled: False leaves the model untouched.
        **options: of `RoundTrip`: key_bits, value_bits, mean_key, balance, measure, rotation, seed, ...

    Returns:
        The patch, with its record. `remove` undoes it, and so does leaving it as a context.

    Raises:
        UnsupportedModelError: `model` is no module; in a forward: model incompatible, there was no attention
            call that could be intercepted.
        NotAppliedError: when it is left as a context, or in `check`: compression not applied.
        InvalidInputError: the model is patched already, or an argument cannot be used; in a forward: the
            cache is packed already.

    Example:
        >>> import torch
        >>> layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> with patch_attention(layer, bits=3) as patch:
        ...     _ = layer(torch.randn(1, 256, 64))
        >>> len(patch.record.calls), patch.record.calls[0].key_shape
        (1, (1, 4, 256, 16))
    """
    trip = RoundTrip(bits, **options)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model incompatible: a {type(model).__name__} is no torch.nn.Module; of a pipeline give the "
            "part that holds the attention, such as pipe.model, pipe.unet or pipe.transformer"
        )
    with model_lock(model):
        if _STATE in vars(model):
            raise InvalidInputError(
                f"the attention of {type(model).__name__} is patched already; remove that first"
            )
        return AttentionPatch(model, trip, enabled)


class AttentionPatch:
    """What `patch_attention` has put on a model; a context that undoes it when it is left.

    Args:
        model: to patch.
        trip: what is done in a call.
        enabled: False does nothing.
    """

    def __init__(self, model: nn.Module, trip: RoundTrip, enabled: bool = True) -> None:
        self.model, self.trip = model, trip
        self._forward: Replaced | None = None
        if enabled:
            vars(model)[_STATE] = self
            self._forward = Replaced(model, "forward", self._run)

    @property
    def record(self) -> AttentionRecord:
        """What the patch did since it was made, or since `record.clear()`."""
        return self.trip.record

    @property
    def active(self) -> bool:
        """Whether the model is patched."""
        return self._forward is not None

    def check(self) -> None:
        """Refuse a run in which nothing was compressed.

        Raises:
            NotAppliedError: compression not applied.
        """
        check_applied(self.record, type(self.model).__name__)

    def remove(self) -> None:
        """Put the model's own forward back; does nothing when that is done already."""
        with model_lock(self.model):
            if self._forward is not None:
                self._forward.undo()
                self._forward = None
                del vars(self.model)[_STATE]

    def __enter__(self) -> "AttentionPatch":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        was_active = self.active
        self.remove()
        if kind is None and was_active:
            self.check()

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        before = self.record.seen
        token = TRIP.set(self.trip)
        try:
            with functions_taken_over():
                output = forward(*args, **kwargs)
        finally:
            TRIP.reset(token)
        if self.record.seen == before:
            raise UnsupportedModelError(
                f"model incompatible: a forward of {type(self.model).__name__} made no attention call "
                f"through transformers' attention functions or torch.nn.functional.{SDPA}; compiled graphs "
                'hide them too. Load the model with attn_implementation="sdpa", if it has that, or leave the '
                "patch out"
            )
        return output


def check_applied(record: AttentionRecord, name: str) -> None:
    """Refuse a run in which nothing was compressed.

    Args:
        record: of the run.
        name: of the model.

    Raises:
        NotAppliedError: compression not applied.
    """
    if not record.calls:
        reasons = "; ".join(f"{count} calls: {reason}" for reason, count in record.skipped.items())
        raise NotAppliedError(
            f"compression not applied: no attention call of {name} was compressed "
            f"({reasons or 'none was seen; run the model while the patch is on'})"
        )
