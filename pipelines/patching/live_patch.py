"""Keys and values compressed and restored inside every attention call of a model; no cache is touched."""

from collections.abc import Callable
from typing import Any

from torch import nn

from quantpress.errors import InvalidInputError, NotAppliedError, UnsupportedModelError
from quantpress.pipelines.method_replacement import MethodReplacement
from quantpress.pipelines.patching.attention_functions import SDPA, TRIP, functions_taken_over
from quantpress.pipelines.patching.attention_record import AttentionRecord
from quantpress.pipelines.patching.round_trip import RoundTrip
from quantpress.presses.models.lock import model_lock

_STATE = "_quantpress_attention_patch"


def patch_attention(
    model: nn.Module, bits: float = 4, *, enabled: bool = True, **options: Any
) -> "AttentionPatch":
    """Make every attention call of a model work on keys and values that were packed and restored just before.

    This shows what a code width does to a model, with or without a cache; the model's cache is not changed.
    It saves no memory by itself: the record tells how much packing could save. Attention calls are found in
    two places: transformers' attention functions, and torch.nn.functional.scaled_dot_product_attention, which
    diffusers and most other models call. Both are wrapped only while a forward of the model runs. It is made
    for inference: no gradient reaches keys and values.

    Args:
        model: any module. Calls of its forward are patched, in the thread that makes them.
        bits: code width of keys and values.
        enabled: False leaves the model untouched.
        **options: of `RoundTrip`: key_bits, value_bits, mean_key, balance, measure, rotation, seed, ...

    Returns:
        The patch, with its record. `remove` undoes it, and so does the end of a `with` block over it.

    Raises:
        UnsupportedModelError: `model` is not a module. Also raised by a forward that makes no attention call
            that can be found.
        NotAppliedError: raised by `check`, and at the end of a `with` block, when no attention call was
            compressed.
        InvalidInputError: the model is patched already, or an argument cannot be used. Also raised by a
            forward over a cache that is packed already.

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
            f"model incompatible: a {type(model).__name__} is no torch.nn.Module; of a pipeline, give the "
            "part that holds the attention, such as pipe.model, pipe.unet or pipe.transformer"
        )
    with model_lock(model):
        if _STATE in vars(model):
            raise InvalidInputError(
                f"the attention of {type(model).__name__} is patched already; remove that first"
            )
        return AttentionPatch(model, trip, enabled)


class AttentionPatch:
    """A patch of a model's attention; as a context manager it is removed at the end of the block.

    Args:
        model: the model to patch.
        trip: what is done in each attention call.
        enabled: False leaves the model untouched.
    """

    def __init__(self, model: nn.Module, trip: RoundTrip, enabled: bool = True) -> None:
        self.model, self.trip = model, trip
        self._forward: MethodReplacement | None = None
        self._removed = False
        if enabled:
            vars(model)[_STATE] = self
            self._forward = MethodReplacement(model, "forward", self._run)

    @property
    def record(self) -> AttentionRecord:
        """What the patch has done since it was made, or since `record.clear()`."""
        return self.trip.record

    @property
    def active(self) -> bool:
        """Whether the model is patched."""
        return self._forward is not None

    def check(self) -> None:
        """Refuse a run in which nothing was compressed.

        Raises:
            NotAppliedError: no attention call was compressed.
        """
        check_applied(self.record, type(self.model).__name__)

    def remove(self) -> None:
        """Put the model's own forward back; does nothing when this was done already."""
        with model_lock(self.model):
            if self._forward is not None:
                self._forward.undo()
                self._forward, self._removed = None, True
                del vars(self.model)[_STATE]

    def __enter__(self) -> "AttentionPatch":
        if self._removed:
            raise InvalidInputError(
                f"the patch of {type(self.model).__name__} was removed before, and does nothing; call "
                "patch_attention(model, ...) again"
            )
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
        record: the record of the run.
        name: the model's name, for the message.

    Raises:
        NotAppliedError: no attention call was compressed.
    """
    if not record.calls:
        reasons = "; ".join(f"{count} calls: {reason}" for reason, count in record.skipped.items())
        raise NotAppliedError(
            f"compression not applied: no attention call of {name} was compressed "
            f"({reasons or 'none was seen; run the model while the patch is on'})"
        )
