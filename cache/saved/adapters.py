"""The adapters of a model (LoRA and its relatives, of PEFT or through transformers), apart from its weights.

Only the weights and settings of the active adapters count, in the order in which they act. Their names do not
count, nor do adapters that are loaded but inactive. Layers of PEFT are recognized by their attributes, so
that PEFT need not be installed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

_BASE = (".base_layer.", ".original_module.")
"""Submodules in which an adapted layer of PEFT keeps the original layer."""


@dataclass
class Adapters:
    """The adapters that act on a model.

    Attributes:
        names: names of the active adapters, in the order in which they act.
        merged: names of the adapters that were merged into the weights.
        scaling: the scaling factors of the active adapters, each value once, ascending.
        weights: tensors of the active adapters, by layer, kind and number of the adapter in its layer.
        settings: plain settings of the active adapters, by layer, kind and number.
        owned: ids of the tensors of all adapters, active or not.
    """

    names: list[str] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    owned: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> "Adapters":
        """The adapters of a model in its present state."""
        found, scaling = cls(), set()
        for path, layer in _adapted_layers(model):
            tensors = dict(_tensors(layer))
            found.owned.update(id(tensor) for tensor in tensors.values())
            merged = list(getattr(layer, "merged_adapters", ()))
            found.merged += [name for name in merged if name not in found.merged]
            here = {name for _, name, _ in tensors}
            active = [] if layer.disable_adapters or merged else [n for n in _active(layer) if n in here]
            found.names += [name for name in active if name not in found.names]
            for number, name in enumerate(active):
                for (kind, owner, rest), tensor in tensors.items():
                    if owner == name:
                        found.weights[f"{path} {kind} {number} {rest}"] = tensor
                for kind, value in _settings(layer, name):
                    found.settings[f"{path} {kind} {number}"] = value
                    if kind == "scaling" and isinstance(value, (int, float)):
                        scaling.add(float(value))
        found.scaling = sorted(scaling)
        return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`; any other model is returned as it is."""
    inner = getattr(model, "get_base_model", None)
    base = inner() if callable(inner) else model
    return base if isinstance(base, nn.Module) else model


def plain_name(name: str) -> str:
    """The name that a weight would have without an adapter around its layer."""
    for part in _BASE:
        name = name.replace(part, ".")
    return name


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, layer in model.named_modules():
        # PreTrainedModel has a method called disable_adapters
        if isinstance(getattr(layer, "disable_adapters", None), bool) and hasattr(
            layer, "adapter_layer_names"
        ):
            yield plain_name(f"{path}."), layer


def _active(layer: Any) -> list[str]:
    active = layer.active_adapters
    return [active] if isinstance(active, str) else list(active)


def _tensors(layer: Any) -> Iterator[tuple[tuple[str, str, str], Tensor]]:
    """The tensors of every adapter of a layer, by (kind, adapter, name in the adapter)."""
    for kind in layer.adapter_layer_names:
        held: Any = getattr(layer, kind, None)
        for name in held.keys() if hasattr(held, "keys") else ():
            part = held[name]
            if isinstance(part, Tensor):
                yield (kind, name, ""), part
            elif isinstance(part, nn.Module):
                for rest, tensor in part.named_parameters():
                    yield (kind, name, rest), tensor


def _settings(layer: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    for kind in getattr(layer, "other_param_names", ()):
        value = getattr(layer, kind, None)
        value = value.get(adapter) if isinstance(value, dict) else None
        if isinstance(value, (bool, int, float, str)):
            yield kind, value
