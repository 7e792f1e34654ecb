"""What a forward hook on an attention module sees of a prefill, and checks of the cache it finds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from quantpress.cache import host
from quantpress.cache.layer import PackedLayer
from quantpress.deferred import judge
from quantpress.errors import CompositionError, InvalidInputError, NonFiniteError, UnsupportedModelError
from quantpress.kernels.moments import not_finite
from quantpress.presses.models.old_names import OldNames

_CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
_NOTES = "_quantpress_noted"
_FRESH_CACHE = "pass a fresh past_key_values=DynamicCache()"


@dataclass(frozen=True)
class PrefillCall:
    """One attention module's part in a prefill.

    Args:
        module: the attention module.
        cache: the cache that it filled.
        hidden_states: [B, N, hidden], its input.
        position_embeddings: cos and sin, [B, N, rotary dim] each, or None.
        attention_mask: as the model passed it, or None.
    """

    module: nn.Module
    cache: Cache
    hidden_states: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    attention_mask: torch.Tensor | None

    @property
    def layer_idx(self) -> int:
        """Index of the module's layer."""
        return int(self.module.layer_idx)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """N, the tokens of this prefill."""
        return self.hidden_states.shape[1]


def prefill_call(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> PrefillCall | None:
    """Read the arguments of a forward hook; None when there is no cache, or no prefill by kvpress's rule.

    Raises:
        UnsupportedModelError: the model does not tell its attention the position in the text, or keeps keys
            and values in something other than a transformers `Cache`.
    """
    cache = next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None)
    other = next((kwargs[name] for name in _CACHE_ARGUMENTS if kwargs.get(name) is not None), None)
    if cache is None and other is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} keeps keys and values in a {type(other).__name__}, not in layers of a "
            "transformers Cache; use this model without presses"
        )
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    if cache is None:
        return None
    end = _end(kwargs)
    if end is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} is given no cache_position: a prefill cannot be told from decoding; "
            "use this model without presses"
        )
    if end != hidden_states.shape[1]:
        return None
    mask = kwargs.get("attention_mask")
    return PrefillCall(
        module,
        cache,
        hidden_states,
        kwargs.get("position_embeddings"),
        mask if isinstance(mask, torch.Tensor) else None,
    )


def _end(kwargs: dict[str, Any]) -> int | None:
    """The position after the last one of a call; None where it is given none."""
    known = kwargs.end if isinstance(kwargs, OldNames) else None
    if known is not None:
        return known
    position = kwargs.get("cache_position")
    return None if position is None else 1 + int(_noted(position, "end", lambda: position[-1]))


def _noted(tensor: torch.Tensor, name: str, find: Callable[[], Any]) -> Any:
    """A number that follows from a tensor, which a model gives to all its layers; read from it once."""
    version = None if tensor.is_inference() else tensor._version
    noted: dict[str, tuple[int | None, Any]] = vars(tensor).setdefault(_NOTES, {})
    if name not in noted or noted[name][0] != version:
        noted[name] = version, find().item()
    return noted[name][1]


def forget_attention_weights(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook between evictors: drop attention weights that include tokens evicted since.

    "eager" attention returns weights, and presses prefer them to their own. Without them they compute some.
    """
    weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    call = None if weights is None else prefill_call(module, args, kwargs)
    if weights is None or call is None or call.cache.get_seq_length(call.layer_idx) == weights.shape[-1]:
        return output
    return (output[0], None, *output[2:])


def plain_states(cache: Cache, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [B, Hkv, T, D] and values [B, Hkv, T, Dv] of a layer that can be packed.

    Raises:
        InvalidInputError: the layer is static, quantized by transformers, already packed, or not a
            `DynamicLayer`.
    """
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    name = type(cache).__name__ if layer is None else f"{type(cache).__name__} of {type(layer).__name__}"
    if isinstance(layer, PackedLayer):
        raise InvalidInputError(
            f"layer {layer_idx} of the cache is packed already; {_FRESH_CACHE} for each new context"
        )
    plain = isinstance(layer, DynamicLayer) and not host.holds_more(layer)
    if layer is None or not plain or layer.keys is None or layer.values is None:
        raise InvalidInputError(f"a {name} cannot be packed; {_FRESH_CACHE}")
    return layer.keys, layer.values


def check_fresh(call: PrefillCall, keys: torch.Tensor) -> None:
    """Refuse a cache that held tokens before this prefill.

    Raises:
        InvalidInputError: there are more keys [B, Hkv, T, D] than tokens in the prefill.
    """
    if keys.shape[2] > call.tokens:
        raise InvalidInputError(
            f"the cache held {keys.shape[2] - call.tokens} tokens before this prefill of {call.tokens}; "
            f"{_FRESH_CACHE}"
        )


def check_states(call: PrefillCall, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Refuse keys and values that cannot be packed, or cannot be packed safely.

    Raises:
        InvalidInputError: the cache held tokens before this prefill.
        CompositionError: tokens were evicted from a padded batch.
        NonFiniteError: keys or values hold NaN or infinity (where checks are deferred, when they are
            settled).
    """
    check_fresh(call, keys)
    check_padding(call, keys.shape[2])
    judge(partial(_check_finite, call.layer_idx), not_finite(keys, values))


def _check_finite(layer_idx: int, not_finite: list[float]) -> None:
    for name, broken in zip(("keys", "values"), not_finite, strict=True):
        if broken:
            raise NonFiniteError(
                f"the {name} of layer {layer_idx} hold NaN or infinity; load the model in bfloat16 or "
                f"float32, or leave this layer unpacked with layer_bits={{{layer_idx}: 16}}"
            )


def check_padding(call: PrefillCall, kept: int) -> None:
    """Refuse an eviction from a padded batch.

    Args:
        call: the prefill.
        kept: how many of its tokens are left; 0 when a press will read the context again.

    Raises:
        CompositionError: the batch is padded, and fewer tokens are left than were read.
    """
    seen = call.tokens
    if kept < seen and is_padded(call.attention_mask):
        what = f"evicted {seen - kept} of {seen} tokens from" if kept else "reads again, without its mask,"
        raise CompositionError(
            f"a press {what} a padded batch, so that slots no longer match the attention mask; give contexts "
            "one at a time, or of equal length, or evict nothing"
        )


def is_padded(mask: torch.Tensor | None) -> bool:
    """Whether the last query cannot see every token: mask [B, N] 0/1, or [B, 1, N, N] bool or additive."""
    if mask is None:
        return False
    return not _noted(mask, "seen", lambda: _seen(mask).all())


def _seen(mask: torch.Tensor) -> torch.Tensor:
    last = mask if mask.dim() == 2 else mask[:, :, -1]
    return last if last.dtype == torch.bool else (last != 0 if mask.dim() == 2 else last == 0)
