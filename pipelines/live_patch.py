"""Keys and values compressed and restored inside every attention call of a model; no cache is touched."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantpress.cache.attention import model_eager_attention
from quantpress.cache.states import PackedStates
from quantpress.errors import InvalidInputError, NotAppliedError, UnsupportedModelError
from quantpress.pipelines.attention_record import AttentionRecord
from quantpress.pipelines.replaced import Replaced
from quantpress.pipelines.round_trip import RoundTrip

_STATE = "_quantpress_attention_patch"
_SDPA = "scaled_dot_product_attention"


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
        token = _TRIP.set(self.trip)
        try:
            with _Functions.taken_over(), _PatchedFunctions():
                output = forward(*args, **kwargs)
        finally:
            _TRIP.reset(token)
        if self.record.seen == before:
            raise UnsupportedModelError(
                f"model incompatible: a forward of {type(self.model).__name__} made no attention call "
                f"through transformers' attention functions or torch.nn.functional.{_SDPA}; compiled graphs "
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


_TRIP: ContextVar[RoundTrip | None] = ContextVar("round trip", default=None)


def _patched(query: torch.Tensor, keys: Any, values: Any, attention: Any, name: str) -> Any:
    """An attention call; the functions that it calls itself are not patched once more."""
    trip = _TRIP.get()
    if trip is None:
        return attention(keys, values)
    if isinstance(keys, PackedStates) or isinstance(values, PackedStates):
        raise InvalidInputError(
            "the cache is packed already, and its keys and values would be quantized twice; use the patch "
            "without a press, and disable(model) before"
        )
    token = _TRIP.set(None)
    try:
        return trip.attend(query, keys, values, attention, name)
    finally:
        _TRIP.reset(token)


class _PatchedFunctions(TorchFunctionMode):
    """Finds calls of `scaled_dot_product_attention` by whatever name.

    It does not see those inside other functions of torch (multi-head attention): for them the name in
    torch.nn.functional is taken over too.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not _own_sdpa or _TRIP.get() is None:
            return func(*args, **kwargs)
        return _patched_sdpa(*args, **kwargs)


_own_sdpa = F.scaled_dot_product_attention


@functools.wraps(_own_sdpa)
def _patched_sdpa(query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return _patched(query, key, value, lambda k, v: _own_sdpa(query, k, v, *args, **kwargs), _SDPA)


class _Functions:
    """Attention functions of transformers and torch, taken over while a patched forward runs."""

    _running = 0
    _lock = threading.Lock()

    @classmethod
    @contextmanager
    def taken_over(cls) -> Iterator[None]:
        with cls._lock:
            cls._running += 1
            if cls._running == 1:
                _take_over()
        try:
            yield
        finally:
            with cls._lock:
                cls._running -= 1
                if not cls._running:
                    _give_back()


def _take_over() -> None:
    F.scaled_dot_product_attention = _patched_sdpa
    for name in list(ALL_ATTENTION_FUNCTIONS.keys()):
        if "paged" not in name:
            ALL_ATTENTION_FUNCTIONS[name] = _Interface(ALL_ATTENTION_FUNCTIONS[name])
    if "eager" not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS["eager"] = _Interface(model_eager_attention)


def _give_back() -> None:
    if F.scaled_dot_product_attention is _patched_sdpa:
        F.scaled_dot_product_attention = _own_sdpa
    for name in list(ALL_ATTENTION_FUNCTIONS.keys()):
        function = ALL_ATTENTION_FUNCTIONS[name]
        if not isinstance(function, _Interface):
            continue  # something was put on top since: ours does nothing any more
        if function.original is model_eager_attention:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = function.original


class _Interface:
    """One of transformers' attention functions."""

    def __init__(self, original: Any) -> None:
        self.original = original
        functools.update_wrapper(self, original, updated=())

    def __call__(
        self, module: Any, query: torch.Tensor, key: Any, value: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def attention(keys: Any, values: Any) -> Any:
            return self.original(module, query, keys, values, *args, **kwargs)

        return _patched(query, key, value, attention, type(module).__name__)
