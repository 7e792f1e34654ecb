"""What a forward over one token was called with and gives, and whether a model can be captured at all."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from quantpress.cache.tokens.evicted_slots import named_to_hide
from quantpress.presses.models.eligibility import unreadable
from quantpress.presses.models.support import attention_modules, in_chunks, is_sliding, window_of

COPIED = ("input_ids", "position_ids", "cache_position")
OPTIONS = ("logits_to_keep", "return_dict", "use_cache")


@dataclass(frozen=True)
class SingleToken:
    """The arguments of a forward over one token for each sequence of a batch.

    Args:
        cache: its past_key_values.
        mask: its attention_mask, or None.
        tensors: those of `COPIED`, by name.
        options: those of `OPTIONS` that were given, by name.
        open_mask: [1, 1, 1, 1] mask to use instead, in arguments made by `static`.
    """

    cache: Cache
    mask: torch.Tensor | None
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    open_mask: torch.Tensor | None = None

    @classmethod
    def read(
        cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "SingleToken | None":
        """Read a call's arguments; None when it is something else than one plain token over a cache."""
        given = _by_name(signature, args, kwargs)
        ids, cache, mask = (
            given.pop(name, None) for name in ("input_ids", "past_key_values", "attention_mask")
        )
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        if not isinstance(cache, Cache) or not (mask is None or isinstance(mask, torch.Tensor)):
            return None
        places = {name: given.pop(name, None) for name in COPIED[1:]}
        options = {name: given.pop(name) for name in OPTIONS if given.get(name) is not None}
        if any(value is not None and value is not False for value in given.values()):
            return None  # labels, embeddings, attention weights, ...
        if options.get("use_cache", True) is not True or not isinstance(
            options.get("logits_to_keep", 0), int
        ):
            return None
        if places["cache_position"] is None:
            places["cache_position"] = torch.full(
                (1,), cache.get_seq_length(), dtype=torch.int64, device=ids.device
            )
        if places["position_ids"] is None:
            places["position_ids"] = places["cache_position"].unsqueeze(0)
        return cls(cache, mask, {"input_ids": ids, **places}, options)

    def like(self, other: "SingleToken") -> bool:
        """Whether the other differs in the values of its tensors at most."""
        return (
            self.cache is other.cache
            and self.options == other.options
            and all(
                mine.shape == other.tensors[name].shape and mine.dtype == other.tensors[name].dtype
                for name, mine in self.tensors.items()
            )
        )

    def static(self, model: PreTrainedModel) -> "SingleToken":
        """The same arguments in memory of their own, for `fill`."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = {name: torch.empty_like(one, device=model.device) for name, one in self.tensors.items()}
            seen = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
        return SingleToken(self.cache, None, tensors, self.options, seen)

    def fill(self, other: "SingleToken") -> None:
        """Take over the values of another one's tensors."""
        for name, tensor in self.tensors.items():
            tensor.copy_(other.tensors[name], non_blocking=True)

    def arguments(self) -> dict[str, Any]:
        """For the model's forward.

        The mask is one of four dimensions, which models hand on as it is: nothing is built from lengths.
        """
        return {
            **self.tensors,
            **self.options,
            "past_key_values": self.cache,
            "attention_mask": self.open_mask,
        }


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name, those that went into **kwargs too."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def hides_nothing(mask: torch.Tensor) -> bool:
    """Whether a mask [B, T] of 0 and 1 hides no token. Waits for the device."""
    return bool(mask.all())


def copied(output: Any) -> Any:
    """The tensors of a model's output in memory of their own: the next replay writes over them."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: copied(value) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(copied(value) for value in output)
    return output.clone() if isinstance(output, torch.Tensor) else output


def uncapturable(model: PreTrainedModel) -> str | None:
    """Why replays of this model would not do what its forward does; None when they would."""
    devices = {tensor.device for tensor in chain(model.parameters(), model.buffers())}
    if len(devices) > 1 or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices, or offloaded"
    if getattr(model, "_tp_size", None) not in (None, 1):
        return "the model is split by tensor parallelism"
    if model.training:
        return "the model is in training mode"
    modules = attention_modules(model)
    reason = unreadable(model)
    if reason is not None:
        return reason
    if any(in_chunks(module) for module in modules):
        return "attention looks back over chunks"
    for name, module in model.named_modules():
        if module is not model and any(map(_is_foreign, _hooks(module))):
            return f"{name} has a forward hook, which a replay would not run"
    if any(named_to_hide(module) is not None for module in modules):
        return "a head-wise press masks tokens in place of removing them"
    return None


def windows_of(model: PreTrainedModel) -> dict[int, int]:
    """How many tokens a query sees, itself included, by the index of layers in which it does not see all."""
    windows: dict[int, int] = {}
    for module in filter(is_sliding, attention_modules(model)):
        index: Any = module.layer_idx
        window = window_of(module)
        if window is not None:
            windows[index] = window
    return windows


def _hooks(module: nn.Module) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _is_foreign(hook: Any) -> bool:
    """Ours do nothing to a single token over a packed cache."""
    owner = getattr(hook, "func", hook)
    return not str(getattr(owner, "__module__", "")).startswith("quantpress.")
