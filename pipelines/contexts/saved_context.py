"""A `CachedContext` on disk: one file with the cache, the prompt's ids and the model's fingerprint."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from quantpress.cache import PackedLayer, host
from quantpress.cache.ranks import Ranks, kv_heads, ranks_of
from quantpress.cache.saved.fingerprint import difference, model_fingerprint
from quantpress.cache.saved.format import read_file, write_file
from quantpress.cache.saved.head_parts import all_heads, all_slots, own_heads, own_slots
from quantpress.cache.saved.layers import cache_of, cache_parts
from quantpress.cache.settings import LayerSettings
from quantpress.codecs.parts import Parts
from quantpress.errors import CacheFileError, InvalidInputError, QuantPressError
from quantpress.pipelines.attention_masks import HiddenSlots
from quantpress.presses.base_press import BasePress
from quantpress.presses.models.attention import attention_modules, decoder_of, full_attention_modules
from quantpress.presses.models.lock import model_lock
from quantpress.presses.traits import members
from quantpress.presses.turboquant import TurboQuant

_INDICES = ("batch", "head", "slot")


@dataclass(frozen=True)
class SavedContext:
    """What a file holds, as the arguments of `CachedContext` of the same names; `press` is in words."""

    cache: Cache
    tokens_seen: int
    token_ids: torch.Tensor
    after: str
    press: str
    masks: HiddenSlots


def save_context(
    context: SavedContext, model: dict[str, Any], path: str | os.PathLike[str], ranks: Ranks | None = None
) -> int:
    """Write a context that the model with this fingerprint has read; see `CachedContext.save`.

    Processes that share the model all call this, and the first of them writes.
    """
    cache = cache_parts(context.cache)
    if ranks is None:
        return _write(context, cache, model, path)
    if ranks.split_heads:
        layers: Any = context.cache.layers
        masks = {
            layer: all_slots(slots, layers[layer].keys.shape[1], ranks)
            for layer, slots in _masks(context, ranks)
        }
        cache, context = all_heads(cache, ranks), replace(context, masks=masks)
    written = 0
    with ranks.together():
        if ranks.first:
            written = _write(context, cache, model, path)
    return int(ranks.each(written)[0])


def _masks(context: SavedContext, ranks: Ranks) -> list[tuple[int, Any]]:
    """The slots that this process hides, by each layer in which one of the processes hides some."""
    layers = sorted(set().union(*ranks.each(set(context.masks))))
    none = (torch.empty(0, dtype=torch.int64, device="cpu"),) * len(_INDICES)
    return [(layer, context.masks.get(layer, none)) for layer in layers]


def _write(context: SavedContext, cache: Parts, model: dict[str, Any], path: str | os.PathLike[str]) -> int:
    masks = {
        str(layer): Parts("masks", tensors=dict(zip(_INDICES, indices, strict=True)))
        for layer, indices in context.masks.items()
    }
    whole = Parts(
        "context",
        {"tokens_seen": context.tokens_seen, "after": context.after, "press": context.press},
        {"token_ids": context.token_ids},
        {"cache": cache, "masks": Parts("all_masks", inner=masks)},
    )
    return write_file(path, {"model": model, "context": whole.outline()}, whole.flat())


def load_context(
    path: str | os.PathLike[str], model: PreTrainedModel, known: dict[str, Any], verify: bool
) -> SavedContext:
    """Read a context; see `CachedContext.load`.

    Args:
        path: the file.
        model: the model; each layer is moved to the device of its attention module.
        known: the model's fingerprint.
        verify: as for `read_file`.

    Raises:
        CacheFileError: another model has read the context, or the file is not usable; the message says why.
    """
    ranks = ranks_of(model)
    with nullcontext() if ranks is None else ranks.together():
        return _load(path, model, known, verify, ranks)


def _load(
    path: str | os.PathLike[str],
    model: PreTrainedModel,
    known: dict[str, Any],
    verify: bool,
    ranks: Ranks | None,
) -> SavedContext:
    about, tensors = read_file(path, verify)
    with model_lock(model):
        return _put_together(path, about, tensors, model, known, ranks)


def steady_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The fingerprint of a model, once no other thread reads or answers with it, which changes it."""
    with model_lock(model):
        return model_fingerprint(model)


def _put_together(
    path: str | os.PathLike[str],
    about: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    model: PreTrainedModel,
    known: dict[str, Any],
    ranks: Ranks | None,
) -> SavedContext:
    reason = difference(about.get("model") or {}, known)
    if reason is not None:
        raise CacheFileError(f"{path} was packed with another model: {reason}")
    try:
        whole = Parts.from_outline(about.get("context"), tensors)
        cache, masks = whole.inner["cache"], whole.inner["masks"].inner
        if ranks is not None and ranks.split_heads:
            heads = kv_heads(model) // ranks.count
            masks = {layer: _own_masks(part, heads, ranks.index) for layer, part in masks.items()}
            cache = own_heads(cache, ranks)
        return SavedContext(
            cache_of(_on_devices(cache, model)),
            int(whole.about["tokens_seen"]),
            whole.tensors["token_ids"],
            str(whole.about["after"]),
            str(whole.about["press"]),
            {int(layer): _slots_on_device(part, int(layer), model) for layer, part in masks.items()},
        )
    except (QuantPressError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CacheFileError(f"{path} cannot be used: {error}") from error


def _own_masks(part: Parts, heads: int, index: int) -> Parts:
    slots = own_slots(tuple(part.tensors[name] for name in _INDICES), heads, index)
    return replace(part, tensors=dict(zip(_INDICES, slots, strict=True)))


def check_packed_by(press: BasePress, model: PreTrainedModel, cache: Cache, path: str) -> None:
    """Refuse a cache whose codecs or settings are not those of a press; its windows may be larger.

    Raises:
        CacheFileError: codecs or settings differ; the message names them.
    """
    with model_lock(model):
        _check_layers(press, model, cache, path)


def _check_layers(press: BasePress, model: PreTrainedModel, cache: Cache, path: str) -> None:
    quantizer = next((one for one in members(press) if isinstance(one, TurboQuant)), None)
    for module in full_attention_modules(model):
        index = int(module.layer_idx)  # type: ignore[arg-type]
        layer: Any = cache.layers[index]
        found = layer.settings if isinstance(layer, PackedLayer) else None
        wanted = None
        if quantizer is not None:
            sinks = found.sink_tokens if found else quantizer.sink_tokens
            wanted = quantizer.layer_settings(module, layer.keys.shape[-1], layer.values.shape[-1], sinks)
        if _plain(found) != _plain(wanted):
            before, now = _fields(found), _fields(wanted)
            names = [name for name in before if name in now and before[name] != now[name]]
            shown = ", ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in names)
            raise CacheFileError(
                f"{path} was not packed as this press packs (layer {index}: {shown}); pack it again, or load "
                "it without press="
            )


def _plain(settings: LayerSettings | None) -> LayerSettings | None:
    """With scales of "auto" as float16, which they nearly always are: files know the dtype of each tensor."""
    return None if settings is None else settings.in_one_dtype


def _fields(settings: LayerSettings | None) -> dict[str, Any]:
    """The settings of a layer as plain values."""
    if settings is None:
        return {"packed": False}
    fields: dict[str, Any] = {"packed": True}
    for name, value in vars(settings).items():
        if name.endswith("_codec"):
            fields |= _codec_fields(name[:-6], value.parts())
        else:
            fields[name] = value
    return fields


def _codec_fields(side: str, part: Parts) -> dict[str, Any]:
    """The fields of a codec, and of those of its groups of heads."""
    fields = {f"{side}_codec": part.kind}
    fields |= {f"{side} {field}": one for field, one in part.about.items() if field != "constants"}
    for name, inner in part.inner.items():
        fields |= _codec_fields(f"{side} group {name}", inner)
    return fields


def _devices(model: PreTrainedModel) -> list[torch.device]:
    """The device of each layer: of its attention, or of what else says that it belongs to the layer."""
    parts = [*attention_modules(model), *decoder_of(model).modules()]
    found: dict[int, torch.device] = {}
    for part in parts:
        index = getattr(part, "layer_idx", None)
        if isinstance(index, int) and index not in found:
            found[index] = _device(part, model)
    layers = len(host.empty_cache(model).layers) or len(attention_modules(model))
    return [found.get(index, model.device) for index in range(layers)]


def _device(part: nn.Module, model: PreTrainedModel) -> torch.device:
    """Where a module computes: weights that accelerate offloads are on no device until it is called."""
    device = next((weight.device for weight in part.parameters()), model.device)
    if device.type != "meta":
        return device
    hooks = (getattr(one, "_hf_hook", None) for one in part.modules())
    each = (one for hook in hooks for one in getattr(hook, "hooks", (hook,)))
    places = (getattr(one, "execution_device", None) for one in each)
    place = next((place for place in places if place is not None), model.device)
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _on_devices(parts: Parts, model: PreTrainedModel) -> Parts:
    """Each layer on the device of its weights; what stays on the CPU stays mapped."""
    devices = _devices(model)
    own = [one for one in attention_modules(model) if not getattr(one, "is_kv_shared_layer", False)]
    if len(parts.inner) not in (len(devices), len(own)):
        raise InvalidInputError(f"it has {len(parts.inner)} layers, the model has {len(devices)}")
    layers = {index: _moved(part, devices[int(index)]) for index, part in parts.inner.items()}
    return Parts(parts.kind, parts.about, parts.tensors, layers)


def _slots_on_device(part: Parts, layer: int, model: PreTrainedModel) -> tuple[torch.Tensor, ...]:
    moved = _moved(part, _devices(model)[layer])
    return tuple(moved.tensors[name] for name in _INDICES)


def _moved(parts: Parts, device: torch.device) -> Parts:
    return parts if device.type == "cpu" else parts.map(lambda tensor: tensor.to(device))
