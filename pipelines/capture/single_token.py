"""A forward over one token: the arguments it was called with, and copies of them at fixed addresses."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput

from quantpress.cache import host

COPIED = ("input_ids", "position_ids", *((host.PLACES,) if host.CALLS_TAKE_PLACES else ()))
OPTIONS = ("logits_to_keep", "return_dict", "use_cache")


@dataclass(frozen=True)
class SingleToken:
    """The arguments of a forward over one token for each sequence of a batch.

    Args:
        cache: the cache.
        mask: attention_mask, or None.
        tensors: the arguments named in `COPIED`.
        options: the arguments named in `OPTIONS` that were given.
        open_mask: [1, 1, 1, 1] zeros, the mask that `arguments` passes on; only in copies made by `static`.
    """

    cache: Cache
    mask: torch.Tensor | None
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    open_mask: torch.Tensor | None = None
    name: str = host.generate_cache()

    @classmethod
    def read(
        cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "SingleToken | None":
        """Read the arguments of a call; None if it is anything but one plain token over a cache."""
        given = _by_name(signature, args, kwargs)
        ids, mask = (given.pop(name, None) for name in ("input_ids", "attention_mask"))
        name = host.NEW_NAME if given.get(host.NEW_NAME) is not None else host.OLD_NAME
        cache = given.pop(name, None)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return None
        if not isinstance(cache, Cache) or not (mask is None or isinstance(mask, torch.Tensor)):
            return None
        positions = {name: given.pop(name, None) for name in COPIED[1:]}
        options = {name: given.pop(name) for name in OPTIONS if given.get(name) is not None}
        if any(value is not None and value is not False for value in given.values()):
            return None  # labels, embeddings, attention weights, ...
        keeps_last = isinstance(options.get("logits_to_keep", 0), int)
        if options.get("use_cache", True) is not True or not keeps_last:
            return None
        for argument in positions:
            if positions[argument] is None:
                here = torch.full((1,), cache.get_seq_length(), dtype=torch.int64, device=ids.device)
                positions[argument] = here if argument == host.PLACES else here.unsqueeze(0)
        return cls(cache, mask, {"input_ids": ids, **positions}, options, name=name)

    def like(self, other: "SingleToken") -> bool:
        """Whether the other call differs in the values of its tensors at most."""
        return (
            self.cache is other.cache
            and self.options == other.options
            and all(
                own.shape == other.tensors[name].shape and own.dtype == other.tensors[name].dtype
                for name, own in self.tensors.items()
            )
        )

    def static(self, model: PreTrainedModel) -> "SingleToken":
        """The same arguments in memory of their own, without values until `fill`."""
        with torch.inference_mode(False), torch.no_grad():
            tensors = {name: torch.empty_like(one, device=model.device) for name, one in self.tensors.items()}
            open_mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
        return SingleToken(self.cache, None, tensors, self.options, open_mask, self.name)

    def fill(self, other: "SingleToken") -> None:
        """Copy the values of another call's tensors."""
        for name, tensor in self.tensors.items():
            tensor.copy_(other.tensors[name], non_blocking=True)

    def arguments(self) -> dict[str, Any]:
        """The arguments for the model's forward.

        The mask has four dimensions, so that models pass it on as it is and build none from lengths.
        """
        return {
            **self.tensors,
            **self.options,
            self.name: self.cache,
            "attention_mask": self.open_mask,
        }


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name, including those that **kwargs took."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def copied(output: Any) -> Any:
    """A model's output with copies of its tensors, which the next replay would overwrite."""
    if isinstance(output, ModelOutput):
        return type(output)(**{name: copied(value) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(copied(value) for value in output)
    return output.clone() if isinstance(output, torch.Tensor) else output
